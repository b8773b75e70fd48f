#!/bin/sh
# Install Willi from an unpacked release into /opt/willi, or upgrade it. As root:
#
#     ./install.sh                              /usr/bin/python3, or else the first python3 of the PATH
#     PYTHON=/usr/bin/python3.12 ./install.sh   another Python, 3.10 to 3.14
#     ./install.sh --uninstall                  remove the program and the service; /opt/willi/etc stays
#     /opt/willi/install.sh --back              back to the program that was the service willi before this one
#
# What is where afterwards:
#
#     /opt/willi/etc/                     yours; only the files *.example are replaced by an upgrade
#     /opt/willi/releases/DATE/           the program with a Python environment of its own
#     /opt/willi/current                  a link to it
#     /opt/willi/{willi.py,willi_lib,venv,willi.service,willi.init,install.sh}   links into it
#     /etc/systemd/system/willi.service   where systemd runs
#     /etc/init.d/willi, /etc/logrotate.d/willi, /var/log/willi.log   where it does not
#
# An upgrade is built in a new directory beside the old one, and one rename puts it in force. Until then nothing that
# runs has changed. If the new program does not come up, the old one is put back.
#
# Another program that runs as the service willi, such as the Willi that was written in Go, reads willi.conf, too. So the
# new file is written beside it, as willi.conf.new, and takes its place only when the new program does.
set -eu
PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin   # `su` without - has no sbin
export PATH
unset CDPATH   # with it `cd` prints where it went, and may go elsewhere

TARGET=/opt/willi
CONFIG=$TARGET/etc/willi.conf
UNIT=/etc/systemd/system/willi.service
INIT=/etc/init.d/willi
SERVICE_FILES="$UNIT:willi.service $INIT:willi.init"   # and their names in a release
LOGROTATE=/etc/logrotate.d/willi
LINKED="willi.py willi_lib venv willi.service willi.init install.sh"   # in $TARGET, into the release in force
OLDEST_PYTHON=3.10
NOBODY=65534   # an account without rights, on every Linux

main() {
    case ${1-} in
        '') install_willi ;;
        --uninstall) uninstall_willi ;;
        --back) go_back ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
}

# A terminal that is lost is no reason to stop half way.
say() { echo "$*" || true; }
complain() { echo "install.sh: $*" >&2 || true; }
fail() { complain "$*"; exit 1; }
interrupted() { complain "interrupted. What runs and what is installed is as it was."; exit 130; }
not_now() { complain "the service is being replaced, which cannot be left half done. Please wait."; }

# From here on a Ctrl-C or a lost terminal would leave the service stopped.
cannot_be_interrupted() {
    trap not_now HUP INT TERM
    trap '' PIPE
}

install_willi() {
    trap interrupted HUP INT TERM
    need_root
    source=$(cd "$(dirname "$0")" && pwd -P)
    need_release
    python=$(find_python)
    need_good_python
    need_system_account
    # From here on something changes.
    umask 022
    unset PYTHONHOME PYTHONPATH
    make_account
    make_directories
    lock
    release=$(mktemp -d "$TARGET/releases/$(date +%Y-%m-%d.%H%M%S).XXX")
    trap throw_away EXIT
    previous=$(in_force)
    serving=$(service_state)
    choose_configuration
    build
    need_libraries
    check_configuration
    cannot_be_interrupted
    save_changed_service_files
    put_in_force "$release"
    put_configuration_in_force
    run_service
    remove_other_releases
    say_what_is_next
}

# --- Before anything is changed ---

need_root() {
    [ "$(id -u)" = 0 ] || fail "must be run as root: it makes a user, a service and $TARGET."
}

need_release() {
    case $source/ in
        "$(readlink -m $TARGET)"/*) fail "this is the copy that is installed: run install.sh of an unpacked release." ;;
    esac
    for part in willi.py willi_lib requirements.txt etc/willi.conf.example etc/willi.service etc/willi.init; do
        [ -e "$source/$part" ] || fail "there is no $part in $source: unpack the release again."
    done
}

# That of the system before one that happens to come first in root's PATH, which users may be unable to run.
find_python() {
    if [ -n "${PYTHON-}" ]; then
        command -v "$PYTHON" || fail "PYTHON=$PYTHON is no program."
    elif [ -x /usr/bin/python3 ]; then
        echo /usr/bin/python3
    else
        command -v python3 || fail "there is no python3 here: apt-get install python3-venv (Debian, Ubuntu)" \
            "or dnf install python3 (Fedora, Red Hat)."
    fi
}

need_good_python() {
    case $python in
        /*) ;;
        *) fail "PYTHON=$python: write the whole path." ;;
    esac
    version=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run."
    "$python" -I -c "import sys; sys.exit(sys.version_info < (${OLDEST_PYTHON%.*}, ${OLDEST_PYTHON#*.}))" ||
        fail "$python is Python $version, and Willi needs $OLDEST_PYTHON or later. Install one and name it:" \
            "apt-get install python3.11-venv (Debian, Ubuntu) or dnf install python3.12 (Fedora, Red Hat)," \
            "then PYTHON=/usr/bin/python3.11 ./install.sh"
    runs_for_everybody 2>/dev/null ||
        fail "$python can be run by root only, and Willi runs as the user willi." \
            "Take one that all users can run: PYTHON=/usr/bin/python3 ./install.sh"
    "$python" -I -c 'import ensurepip, ssl, venv' 2>/dev/null ||
        fail "$python cannot make a virtual environment. Install what it lacks:" \
            "apt-get install python$version-venv (Debian, Ubuntu) or dnf install python3 (Fedora, Red Hat)."
}

# By way of a shell: setpriv itself still has root's right to look into every directory.
runs_for_everybody() (
    cd / && setpriv --reuid=$NOBODY --regid=$NOBODY --clear-groups sh -c 'exec "$1" -I -c "import ssl"' sh "$python"
)

# Willi is also a first name.
need_system_account() {
    entry=$(getent passwd willi) || return 0
    case $entry in
        *nologin | *false) ;;
        *) fail "the user willi can log in (its shell is ${entry##*:}), so it is a person's account. Willi needs one" \
            "of that name for itself: rename that one, or if it is for Willi: usermod -s /usr/sbin/nologin willi" ;;
    esac
}

# --- Building the release beside the one in force ---

make_account() {
    getent group willi >/dev/null || groupadd --system willi
    getent passwd willi >/dev/null ||
        useradd --system --gid willi --no-create-home --home-dir /nonexistent \
            --shell "$(command -v nologin || echo /bin/false)" willi
}

make_directories() {
    mkdir -p $TARGET/releases
    # Passwords may be in there. Every new file is of the group willi as well, however it comes.
    [ -d $TARGET/etc ] || install -d -m 2750 -o root -g willi $TARGET/etc
    [ "$(stat -L -c %G $TARGET/etc)" != willi ] || chmod g+s $TARGET/etc
}

# One install.sh at a time. The kernel forgets the lock when this process ends, however.
lock() {
    exec 9<$TARGET
    flock -n 9 || fail "another install.sh is running."
}

# Where the configuration of the new program is: beside the one that another program may have to read once more.
choose_configuration() {
    configuration=$CONFIG
    [ -z "$previous" ] || return 0
    if [ "$serving" = running ] && grep -qs '^[[:space:]]*\[mappings\]' $CONFIG; then
        fail "the program that runs as the service willi could not start again with $CONFIG, which is in the new form" \
            "already. Nothing has changed. Put the file that it has read back in place, the new one beside it, and run" \
            "install.sh again:
    mv $CONFIG $CONFIG.new
    cp -p YOUR_COPY_OF_THE_OLD_FILE $CONFIG"
    elif [ -e $CONFIG.new ]; then
        configuration=$CONFIG.new
    elif [ "$serving" = running ]; then
        fail "another program runs as the service willi. Nothing has changed. Leave $CONFIG to it, write the new" \
            "configuration into $CONFIG.new, and run install.sh again. docs/from-the-go-program.md of the release" \
            "says more."
    fi
}

build() {
    say "Building in $release ..."
    for part in willi.py willi_lib requirements.txt install.sh etc/willi.service etc/willi.init etc/*.example; do
        cp -R "$source"/$part "$release"
    done
    sed -i "1s|^#!.*|#!$TARGET/venv/bin/python|" "$release/willi.py"
    chmod -R u=rwX,go=rX "$release"
    "$python" -I -m venv "$release/venv" || fail "$python could not make a virtual environment."
    install_libraries
    "$release/venv/bin/python" -I -m compileall -q "$release/willi_lib"   # the user willi may not write there
    number=$(cd "$release" && venv/bin/python willi.py --version) || fail "the new program does not run."
}

install_libraries() {
    if offline=$(PIP_CONFIG_FILE=/dev/null pip_install --isolated --no-index --find-links "$source/wheels" 2>&1); then
        return
    fi
    case $offline in
        *"No matching distribution"*) ;;
        *) fail "pip could not install the wheels of the release: $offline" ;;   # a full disk, a file that is broken
    esac
    say "The release has no wheels for Python $version on $(uname -m). Getting the libraries from the network ..."
    pip_install || fail "pip could not install the libraries. From the wheels of the release: $offline"
}

pip_install() {
    "$release/venv/bin/python" -m pip --disable-pip-version-check --no-input --no-cache-dir --quiet \
        install --use-pep517 --requirement "$release/requirements.txt" "$@"
}

# As the user that will need them: every module of Willi, and so every library and the template of the page. A file
# system may not let them run.
need_libraries() {
    import='import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import willi_lib
for module in pkgutil.walk_packages(willi_lib.__path__, "willi_lib."):
    importlib.import_module(module.name)'
    said=$(as_service "$release/venv/bin/python" -I -c "$import" "$release" 2>&1) && return
    case ,$(findmnt --noheadings --output OPTIONS --target $TARGET 2>/dev/null), in
        *,noexec,*) fail "no program can run in $TARGET: its file system is mounted noexec. Nothing has changed." \
            "mount -o remount,exec $(findmnt --noheadings --output TARGET --target $TARGET), change /etc/fstab" \
            "likewise, and run install.sh again." ;;
    esac
    fail "the new program cannot be used here. Nothing has changed. It says: $(echo "$said" | tail -n 1)"
}

# All that Willi needs at its start: the file, tables, certificates, addresses. Nothing is connected to.
check_configuration() {
    [ -e "$configuration" ] || return 0
    if faults=$(as_service "$release/venv/bin/python" "$release/willi.py" check --quick -c "$configuration" 2>&1); then
        faults=
        return
    fi
    case $serving in
        running) fail "$number cannot use the configuration. Nothing has changed, and the old program goes on. Correct" \
            "this, and run install.sh again:
$faults" ;;
    esac
}

# As the user of the service: root could read more. Drop-ins and /etc/default/willi may name others.
as_service() (
    RUN_AS=willi
    groups=
    if has_systemd; then
        [ -z "$previous" ] || RUN_AS=$(systemctl show --property=User --value willi)
        groups=$(systemctl show --property=SupplementaryGroups --value willi)
    elif [ -r /etc/default/willi ]; then
        . /etc/default/willi
    fi
    cd /
    [ -n "$RUN_AS" ] || exec "$@"
    ports="--inh-caps=-all,+net_bind_service --ambient-caps=-all,+net_bind_service"
    setpriv $ports true 2>/dev/null || ports=   # a container may lack it
    exec setpriv --reuid="$RUN_AS" --regid=willi --groups="$(echo $(id -G "$RUN_AS") $groups | tr ' ' ,)" $ports "$@"
)

# At the end, however it came: what is not in force is of no use. Nor are directories without anything in them.
throw_away() {
    [ "$release" -ef $TARGET/current ] || rm -rf "$release"
    rmdir --ignore-fail-on-non-empty $TARGET/releases $TARGET/etc $TARGET 2>/dev/null || true
}

# --- Putting it in force ---

in_force() { readlink -e $TARGET/current || true; }   # empty: nothing is

put_in_force() {
    write_service_files "$1"   # first: /etc may be read-only, and then nothing has changed yet
    sync -f $TARGET            # so that after a power cut the link does not point at empty files
    point_to "$1" $TARGET/current
    for name in $LINKED; do
        point_to "current/$name" $TARGET/$name
    done
    for example in "$1"/*.example; do
        install -m 640 -o root -g willi "$example" $TARGET/etc/
    done
}

# A link is replaced by rename(2), so that there is always one. Files that were installed by hand make way for it.
point_to() {
    [ -L "$2" ] || rm -rf "$2"
    ln -sfn "$1" "$2.new"
    mv -T "$2.new" "$2"
}

has_systemd() { [ -d /run/systemd/system ]; }
has_init() { command -v start-stop-daemon >/dev/null && command -v update-rc.d >/dev/null; }

# What was changed in place, or another program has put there, is not lost.
save_changed_service_files() {
    for pair in $SERVICE_FILES; do
        file=${pair%:*}
        name=${pair#*:}
        if [ -e "$file" ] && ! cmp -s "$file" $TARGET/current/$name; then
            keep_old "$file" "$TARGET/etc/$name.old"
            say "$file was not as an earlier install.sh wrote it: it is replaced, and kept as $TARGET/etc/$name.old"
        fi
    done
}

# keep_old FILE COPY. An earlier copy with other words in it becomes COPY.~1~.
keep_old() { cmp -s "$1" "$2" || cp -p --backup=numbered "$1" "$2"; }

# Last of all files: until here the program that was here before would still start.
put_configuration_in_force() {
    [ "$configuration" != $CONFIG ] || return 0
    if [ -e $CONFIG ]; then
        keep_old $CONFIG $CONFIG.old
        say "$CONFIG of the program before is kept as $CONFIG.old"
    fi
    mv "$configuration" $CONFIG
}

write_service_files() {
    if has_systemd; then
        install -m 644 "$1/willi.service" $UNIT
        systemctl daemon-reload
    elif has_init; then
        install -D -m 755 "$1/willi.init" $INIT
        [ ! -d ${LOGROTATE%/*} ] || [ -e $LOGROTATE ] || logrotate_rules >$LOGROTATE
    fi
}

# copytruncate: Willi does not open its stdout, so it cannot open it again.
logrotate_rules() {
    cat <<'END'
/var/log/willi.log {
    weekly
    rotate 8
    compress
    delaycompress
    missingok
    notifempty
    copytruncate
}
END
}

# --- The service ---

# running; stopped: by the administrator, who wants it so; failed; none: it is installed for the first time.
service_state() {
    if has_systemd && [ -e $UNIT ]; then
        case $(systemctl show --property=ActiveState,SubState --value willi | tr '\n' ' ') in
            'inactive '*) echo stopped ;;
            'failed '* | *' auto-restart'*) echo failed ;;   # it is not there, however often it is tried again
            *) echo running ;;
        esac
    elif ! has_systemd && [ -x $INIT ]; then
        status=0
        $INIT status >/dev/null 2>&1 || status=$?
        case $status in
            0) echo running ;;
            3) echo stopped ;;
            *) echo failed ;;
        esac
    else
        echo none
    fi
}

run_service() {
    has_systemd || has_init || return 0
    if [ -z "$previous" ] || [ "$serving" = none ]; then
        enable_service
    elif [ "$serving" = stopped ]; then
        return
    fi
    if [ ! -e $CONFIG ]; then
        serving=none   # it cannot run, but its log then says why; say_what_is_next says it here
        restart_service >/dev/null 2>&1 || true
    elif restart_service; then
        serving=running
    else
        give_up
    fi
}

enable_service() {
    if has_systemd; then
        systemctl --quiet enable willi
    else
        update-rc.d willi defaults >/dev/null
    fi
}

restart_service() {
    [ "$serving" != running ] || [ -z "$previous" ] || say_what_a_restart_waits_for
    control_service restart || { say_why >&2; false; }
}

# control_service start|stop|restart. What systemctl says of a failure ("See journalctl -xe") is less than the log says.
control_service() {
    began=$(date +%s)
    if has_systemd; then
        patiently systemctl "$1" willi 2>/dev/null
    else
        patiently $INIT "$1"
    fi
}

say_what_a_restart_waits_for() {
    if has_systemd; then clients="wait"; else clients="are refused"; fi
    say "Restarting the service. What has begun is finished first, for up to drain_timeout (60s unless $CONFIG says" \
        "otherwise); new clients $clients meanwhile."
}

# In a session of its own, which a Ctrl-C does not reach; every 10 seconds there is a word.
patiently() {
    setsid --wait "$@" 9<&- &
    steps=0
    while kill -0 $! 2>/dev/null; do
        sleep 0.2 || true   # a Ctrl-C ends it
        steps=$((steps + 1))
        [ $((steps % 50)) != 0 ] || say "... $((steps / 5)) seconds; still waiting for: $*"
    done
    wait $!
}

# The init script has said it by itself.
say_why() {
    ! has_systemd || journalctl --unit willi --since "@$began" --output cat --no-pager 2>/dev/null | tail -n 20
}

give_up() {
    if [ "$serving" = running ] && [ -z "$previous" ]; then
        put_predecessor_back || fail "$number does not start, nor does the program that was here before." \
            "Correct what is said above, then: $(start_command)"
        remove_program
        fail "$number does not start; the lines above say why. The program that was here before runs again, with its own" \
            "$CONFIG; the new file is $CONFIG.new again. Correct it, and run install.sh again."
    fi
    if [ "$serving" != running ]; then
        remove_other_releases
        fail "$number is installed, but does not start; the lines above say why. Correct it, and then: $(start_command)"
    fi
    say "$number does not start; the lines above say why. The old program is put back ..."
    put_in_force "$previous"
    restart_service || fail "and the old program does not start either. Correct what is said above, then:" \
        "$(start_command)"
    fail "the old program serves again, and $number was thrown away."
}

# --- Back to the program that was the service willi before, such as the one written in Go ---

go_back() {
    need_root
    lock
    old=$(kept_service_files)
    [ -n "$old" ] || fail "there is no service file of another program in $TARGET/etc (willi.service.old or" \
        "willi.init.old): Willi does not know what was here before."
    cannot_be_interrupted
    previous=$(in_force)
    serving=running
    if put_predecessor_back; then
        remove_program
        say "The program that was here before runs again. Willi is removed; its configuration is $CONFIG.new, so that" \
            "install.sh of the release brings it back."
        return
    fi
    say "The program that was here before does not start; the lines above say why. Willi is put back ..."
    control_service stop
    write_service_files "$previous"
    swap_configurations $CONFIG.new $CONFIG.old
    restart_service || fail "and Willi does not start either. Correct what is said above, then: $(start_command)"
    fail "Willi serves again."
}

# Those that save_changed_service_files has kept, and that are not Willi's own with some changes.
kept_service_files() {
    for pair in $SERVICE_FILES; do
        kept=$TARGET/etc/${pair#*:}.old
        if [ -e "$kept" ] && ! grep -q "$TARGET/willi\.py" "$kept"; then
            echo "$pair"
        fi
    done
}

# Everything is as before install.sh ran for the first time. Stopped first: `systemctl restart` would keep the listening
# sockets for a program that does not know what they are.
put_predecessor_back() {
    say "The program that was here before is put back ..."
    old=$(kept_service_files)
    control_service stop
    for pair in $old; do
        cp -p "$TARGET/etc/${pair#*:}.old" "${pair%:*}"
    done
    swap_configurations $CONFIG.old $CONFIG.new
    ! has_systemd || systemctl daemon-reload
    control_service start && stays_up || { say_why >&2; false; }
}

# swap_configurations FROM TO: what is in FROM is in force, and what was is in TO.
swap_configurations() {
    [ -e "$1" ] || return 0
    mv $CONFIG "$2"
    mv "$1" $CONFIG
}

# A unit without Type=, as that of the Go program, is "started" before its program has read a line of its file.
stays_up() {
    for _ in $(seq 15); do   # 6 seconds
        sleep 0.4 || true
        [ "$(service_state)" = running ] || return 1
        ! has_systemd || [ "$(systemctl show --property=NRestarts --value willi)" = 0 ] || return 1
    done
}

start_command() {
    if has_systemd; then
        echo "systemctl start willi"
    elif has_init; then
        echo "$INIT start"
    else
        echo "$TARGET/venv/bin/python $TARGET/willi.py -c $CONFIG"
    fi
}

remove_other_releases() {
    for other in $TARGET/releases/*; do
        [ "$other" -ef $TARGET/current ] || rm -rf "$other"
    done
}

# --- The end ---

say_what_is_next() {
    say "$number is installed in $TARGET."
    has_systemd || has_init || say "There is neither systemd nor start-stop-daemon here, so there is no service."
    if [ ! -e $CONFIG ]; then
        cat <<END
It does not run yet, since there is no $CONFIG. Next:
    cp -p $CONFIG.example $CONFIG
    cp -p $TARGET/etc/upstream_servers.csv.example $TARGET/etc/upstream_servers.csv
    edit both, as README.md says under "Configure", and then
    runuser -u willi -g willi -- $TARGET/willi.py check -c $CONFIG
    $(start_command)
END
    elif [ "$serving" = running ]; then
        log=/var/log/willi.log
        ! has_systemd || log="journalctl -u willi"
        say "It is running. Its log: $log"
    elif [ "$serving" = stopped ]; then
        say "It was stopped, and stays so. To start it: $(start_command)"
    else
        say "To start it: $(start_command)"
    fi
    [ -z "${faults-}" ] || say "It will not start with this configuration:
$faults"
}

# What put_in_force and build have made.
remove_program() {
    for name in $LINKED current releases; do
        rm -rf "${TARGET:?}/$name"
    done
}

uninstall_willi() {
    need_root
    stop_and_forget_service
    remove_program
    say "Willi is removed. Left are $TARGET/etc, the user willi, to whose group its files belong, the log, and what you" \
        "have set for the service. To remove these as well:"
    say "    rm -rf $TARGET /var/log/willi.log* /etc/default/willi $UNIT.d"
    say "    userdel willi"
}

stop_and_forget_service() {
    if has_systemd && [ -e $UNIT ]; then
        systemctl --quiet disable --now willi
        rm -f $UNIT
        systemctl daemon-reload
        systemctl --quiet reset-failed willi 2>/dev/null || true   # there is nothing to forget, as a rule
    fi
    if [ -e $INIT ]; then
        has_systemd || $INIT stop
        rm -f $INIT
        update-rc.d willi remove >/dev/null
        if logrotate_rules | cmp -s - $LOGROTATE; then rm $LOGROTATE; fi   # not one that was changed
    fi
}

main "$@"

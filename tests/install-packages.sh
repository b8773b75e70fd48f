#!/bin/bash
# install-packages.sh FILE|PACKAGE...: install those Debian packages that are missing, as root, without starting a service.
# A FILE lists packages, one a line, # for comments. Without root it only says what is missing: the tests skip with a reason.
# A package manager, or another one of us, that is at work is waited for.
set -euo pipefail

POLICY=/usr/sbin/policy-rc.d   # asked by every package before it starts its service; 101 means no
LOCK=/run/lock/willi-install-packages
PATIENCE=600                   # seconds for the others

wanted=()
for argument; do
    if [ -f "$argument" ]; then
        mapfile -t -O "${#wanted[@]}" wanted < <(sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$argument")
    else
        wanted+=("$argument")
    fi
done

find_missing() {
    local package state
    missing=()
    for package in "${wanted[@]}"; do
        state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || missing+=("$package")
    done
}

# What apt-get and debconf do not wait for themselves: the lock of the lists, of the archives, and of debconf.
patiently() {
    local until=$((SECONDS + PATIENCE)) said
    until said=$("$@" 2>&1); do
        if ! grep -qi 'lock' <<<"$said" || [ "$SECONDS" -ge "$until" ]; then
            echo "$*: $said" >&2
            return 1
        fi
        sleep 1
    done
}

restore_policy() {
    rm -f "$POLICY"
    [ ! -e "$POLICY.before-willi" ] || mv "$POLICY.before-willi" "$POLICY"
}

find_missing
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Not installed, and not root on Debian or Ubuntu to do it: ${missing[*]}" >&2
    exit 0
fi

mkdir -p "${LOCK%/*}"
exec 9>"$LOCK"
flock --wait "$PATIENCE" 9 || { echo "Another make test installs packages, for more than $PATIENCE s: $LOCK" >&2; exit 1; }
find_missing
[ ${#missing[@]} -gt 0 ] || exit 0
trap restore_policy EXIT
[ ! -e "$POLICY" ] || [ -e "$POLICY.before-willi" ] || mv "$POLICY" "$POLICY.before-willi"
printf '#!/bin/sh\nexit 101\n' >"$POLICY"
chmod 755 "$POLICY"

echo "Installing ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive
# Postfix without a configuration: the tests run private instances and nothing of the machine's mail changes.
if command -v debconf-set-selections >/dev/null; then
    patiently sh -c "echo 'postfix postfix/main_mailer_type select No configuration' | debconf-set-selections"
fi
options=(-qq -o "DPkg::Lock::Timeout=$PATIENCE" -o Acquire::Retries=3)
# The services that it starts, if it starts any, must not keep our lock: 9>&-
patiently apt-get "${options[@]}" update 9>&-
patiently apt-get "${options[@]}" install --yes --no-install-recommends "${missing[@]}" 9>&-

#!/bin/bash
# pythons.sh [VERSION...]: `make check`, and the end-to-end tests that need no root, with every Python from 3.10 to 3.14
# that is here, each in a virtual environment of its own (.venvs/VERSION). As root on Debian, the newest one comes with a
# Debian testing that is made for this run in /tmp, if it is not here.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSIONS=(3.10 3.11 3.12 3.13 3.14)
TESTING=forky   # the Debian whose python3 is the newest of them
[ $# = 0 ] || VERSIONS=("$@")

home=$(mktemp -d /tmp/willi-pythons-XXXXXX)
trap 'rm -rf --one-file-system "$home"' EXIT
failed=()
summary=()

# The path of a Python of this version that runs: in PATH, or where pyenv puts it.
find_python() {
    local path
    for path in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*"/bin/python$1"; do
        "$path" -c "" 2>/dev/null && command -v "$path" && return
    done
    return 1
}

# $1: Python, $2: directory of its virtual environment. A test that lacks something says so and is skipped.
run_tests() {
    make check VENV="$2" PYTHON="$1" &&
        env -u CI WILLI_TESTS_ROOT=no make e2e VENV="$2" PYTHON="$1" E2E="${E2E:-tests/e2e}"
}

# Debian testing in $home/root: the mirror of this machine; `make` and what the tests need of a system.
make_testing() {
    local mirror certificates=etc/ssl/certs/ca-certificates.crt   # what pip trusts here, it trusts there
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Identifier: Packages' |
        awk '$2 == "main" && $1 !~ /security/ { print $1; exit }')
    [ -n "$mirror" ] || { echo "apt-get knows no Debian archive."; return 1; }
    # The mirror may be a snapshot of some days ago.
    mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=ca-certificates,curl,git,make,openssl,procps,python3-venv,util-linux \
        "$TESTING" "$home/root" "deb $mirror $TESTING main" &&
        mkdir "$home/root/willi" &&
        git ls-files -z | xargs -0 cp --parents --target-directory "$home/root/willi" &&
        git -C "$home/root/willi" init --quiet &&
        git -C "$home/root/willi" add . &&
        git -C "$home/root/willi" -c user.name=tests -c user.email=tests@willi.example commit --quiet -m tests &&
        cp /etc/resolv.conf "$home/root/etc/resolv.conf" &&
        cp "/$certificates" "$home/root/$certificates"
}

# Run a command in that system; all of its processes end with it.
in_testing() {
    unshare --mount --pid --fork --kill-child bash -c '
        root=$1; shift
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount --rbind /sys "$root/sys"
        exec chroot "$root" "$@"' bash "$home/root" \
        env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 $(env | grep '^PIP_[A-Z_]*=[^ ]*$' || true) "$@"
}

for version in "${VERSIONS[@]}"; do
    began=$SECONDS
    echo "== Python $version"
    if python=$(find_python "$version"); then
        run_tests "$python" ".venvs/$version" && result=passed || result=FAILED
    elif [ "$version" = "${VERSIONS[-1]}" ] && [ "$(id -u)" = 0 ] && command -v mmdebstrap >/dev/null; then
        if make_testing; then
            in_testing E2E="${E2E:-}" /willi/tests/pythons.sh "$version" && result="passed (Debian $TESTING)" || result="FAILED (Debian $TESTING)"
        else
            result="FAILED: no Debian $TESTING could be made"
        fi
    else
        result="not run: there is no python$version here"
    fi
    summary+=("Python $version: $result, $((SECONDS - began)) s")
    case $result in FAILED*) failed+=("$version") ;; esac
done

printf '%s\n' "${summary[@]}"
[ ${#failed[@]} = 0 ] || { echo "Failed: ${failed[*]}"; exit 1; }

#!/bin/bash
# install-packages.sh FILE|PACKAGE...: install those Debian packages that are missing, as root, without starting a service.
# A FILE lists packages, one a line, # for comments. Without root it only says what is missing: the tests skip with a reason.
set -euo pipefail

POLICY=/usr/sbin/policy-rc.d   # asked by every package before it starts its service; 101 means no

wanted=()
for argument; do
    if [ -f "$argument" ]; then
        mapfile -t -O "${#wanted[@]}" wanted < <(sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$argument")
    else
        wanted+=("$argument")
    fi
done

missing=()
for package in "${wanted[@]}"; do
    state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Not installed, and not root on Debian or Ubuntu to do it: ${missing[*]}" >&2
    exit 0
fi

restore_policy() {
    rm -f "$POLICY"
    [ ! -e "$POLICY.before-willi" ] || mv "$POLICY.before-willi" "$POLICY"
}
trap restore_policy EXIT
[ ! -e "$POLICY" ] || [ -e "$POLICY.before-willi" ] || mv "$POLICY" "$POLICY.before-willi"
printf '#!/bin/sh\nexit 101\n' >"$POLICY"
chmod 755 "$POLICY"

echo "Installing ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive
# Postfix without a configuration: the tests run private instances and nothing of the machine's mail changes.
if command -v debconf-set-selections >/dev/null; then
    echo 'postfix postfix/main_mailer_type select No configuration' | debconf-set-selections
fi
options=(-qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
apt-get "${options[@]}" update >/dev/null
apt-get "${options[@]}" install --yes --no-install-recommends "${missing[@]}" >/dev/null

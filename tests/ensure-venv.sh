#!/bin/sh
# ensure-venv.sh PYTHON: see to it that PYTHON is recent enough and can make a virtual environment.
# Debian and Ubuntu ship Python without that part: as root it is installed, otherwise one line says what to install.
set -eu
python=$1

fail() { echo "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "There is no $python here: install Python 3.10 or later (Debian, Ubuntu: apt-get install python3-venv)."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is Python $version: 3.10 or later is needed."
"$python" -c 'import ensurepip, venv' 2>/dev/null && exit 0

package=python$version-venv   # what python3-venv depends on, and right for PYTHON=python3.12 as well
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "$python cannot make a virtual environment: install the package $package first."
echo "Installing $package ..."
exec "$(dirname "$0")/install-packages.sh" "$package"

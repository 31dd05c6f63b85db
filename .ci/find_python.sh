#!/bin/sh
# Prints the path of a CPython that can hold our environment, or says why none.
#
#   .ci/find_python.sh 3.13 3.12 3.14     versions in order of preference
#
# Names on PATH prove nothing: a pyenv shim may refuse to run, `python3` may be
# anything, and Debian ships Pythons that cannot make a virtual environment. So
# every candidate is run and asked. $PYTHON, if set, is asked first.
set -u

[ $# -gt 0 ] || { echo "usage: $0 VERSION..." >&2; exit 2; }
here=$(dirname "$0")
cache=$here/../.cache

# Runs a command for at most half a minute where that can be arranged: a shim
# on a dead network drive must not hang the set-up.
bounded() {
  if command -v timeout >/dev/null 2>&1; then timeout 30 "$@"; else "$@"; fi
}

# The question put to a candidate: are you a 64-bit CPython of version $2 with
# the modules $3? It answers with its real path, which inside a virtual
# environment is that of the Python underneath (ours may be active, and we may
# be about to replace it).
ask() {
  bounded "$1" -I -c '
import importlib, os, sys, sysconfig
version, modules = sys.argv[1], sys.argv[2].split()
fits = (
    "%d.%d" % sys.version_info[:2] == version
    and sys.implementation.name == "cpython"
    and sys.maxsize > 2**32
    and not sysconfig.get_config_var("Py_GIL_DISABLED"))
if not fits: sys.exit(1)
for module in modules: importlib.import_module(module)
inside = sys.prefix != sys.base_prefix
path = getattr(sys, "_base_executable", "") if inside else sys.executable
if not path or not os.access(path, os.X_OK): sys.exit(1)
print(path)
' "$2" "$3" 2>/dev/null </dev/null
}

# One candidate a line, likeliest first; they need not exist.
candidates() {
  roots=${PYENV_ROOT:-}
  old_ifs=$IFS; IFS=:
  for dir in $PATH; do
    echo "$dir/python$1"
    case $dir in */shims) roots="$roots:${dir%/shims}" ;; esac
  done
  for dir in $PATH; do echo "$dir/python3"; echo "$dir/python"; done
  for root in $roots "${HOME:-}/.pyenv"; do
    [ -z "$root" ] || printf '%s\n' "$root/versions/$1".*/bin/python
  done
  IFS=$old_ifs
  for dir in /usr/local/bin /usr/bin /opt/homebrew/bin /opt/local/bin \
      "/Library/Frameworks/Python.framework/Versions/$1/bin"; do
    echo "$dir/python$1"
  done
  printf '%s\n' "${HOME:-}/.local/share/uv/python/cpython-$1".*/bin/python3
}

# Prints the first candidate of any wanted version that has the modules $1.
search() {
  modules=$1; shift
  for version in "$@"; do
    # A here-document, not a pipe, so that `return` leaves this function.
    while IFS= read -r candidate; do
      [ -x "$candidate" ] || continue
      found=$(ask "$candidate" "$version" "$modules") || continue
      [ -n "$found" ] && { echo "$found"; return 0; }
    done <<EOF
$(candidates "$version")
EOF
  done
  return 1
}

# Prints a Python of whatever age that has pip, to fetch packages with.
with_pip() {
  old_ifs=$IFS; IFS=:
  for dir in $PATH; do
    for name in python3 python; do
      [ -x "$dir/$name" ] || continue
      bounded "$dir/$name" -m pip --version >/dev/null 2>&1 </dev/null \
        && { IFS=$old_ifs; echo "$dir/$name"; return 0; }
    done
  done
  IFS=$old_ifs
  return 1
}

# Asks uv, fetched from the package index if need be, for a Python that it
# knows of. It must not download one: that would not be the package index.
by_uv() {
  uv=$(command -v uv) || {
    pip=$(with_pip) || return 1
    uv=$cache/uv/bin/uv
    [ -x "$uv" ] || "$pip" -m pip install --quiet --timeout 30 --retries 2 \
      --target "$cache/uv" uv >/dev/null 2>&1 || return 1
  }
  for version in "$@"; do
    found=$(UV_PYTHON_DOWNLOADS=never bounded "$uv" \
      python find --no-project --system "$version" 2>/dev/null) || continue
    found=$(ask "$found" "$version" "venv") && { echo "$found"; return 0; }
  done
  return 1
}

# Prints the Python that the user named, if it fits; says so if it does not.
by_name() {
  [ -n "${PYTHON:-}" ] || return 1
  named=$(command -v "$PYTHON") && for version in "$@"; do
    ask "$named" "$version" "venv" && return 0
  done
  echo "heptad: PYTHON=$PYTHON cannot be used here (need CPython of version" \
    "$(echo "$*" | sed 's/ /, /g')); looking for another." >&2
  return 1
}

[ "${1:-}" != --pip ] || { with_pip; exit; }
by_name "$@" && exit
search "venv ensurepip" "$@" && exit
# Without ensurepip an environment starts without pip; any other pip will do.
with_pip >/dev/null && search "venv" "$@" && exit
by_uv "$@" && exit
echo "heptad: no Python that can make a virtual environment was found in" \
  "version $(echo "$*" | sed 's/ /, /g'): install one (on Debian with its" \
  "-venv package), or name one with make PYTHON=/path/to/python." >&2
exit 1

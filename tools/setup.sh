#!/usr/bin/env bash
# Brings a checkout to the point where every target of the Makefile can run: system packages, .venv,
# PyTorch, Python packages, native build. What is done already is not done again.
#   tools/setup.sh [--tests | --no-compile]
#     --tests       without GoogleTest there is no point in going on
#     --no-compile  sources may have changed since the last build
# Variables (see the Makefile): TORCH CUDA CUDA_ARCH PYTHON DATA JOBS. CMAKE_ARGS goes to the configuration.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'make: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 2
}

check_variables() {
    [[ $torch =~ ^([0-9]+)\.([0-9]+)(\.[0-9]+)?(\+[a-z0-9.]+)?$ ]] ||
        die "expected TORCH to be a release such as 2.13.0, got \"$torch\""
    ((10#${BASH_REMATCH[1]} * 1000 + 10#${BASH_REMATCH[2]} >= 2011)) ||
        die "expected TORCH to be 2.11 or newer, got \"$torch\""
    [[ -n ${BASH_REMATCH[3]} ]] || torch=${BASH_REMATCH[1]}.${BASH_REMATCH[2]}.0${BASH_REMATCH[4]}
    [[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || die "expected JOBS to be a number from 1 to 9999, got \"$jobs\""
    [[ -z ${DATA:-} || -d $DATA ]] || die "expected DATA to be a folder, got \"$DATA\""
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "expected PYTHON to be a Python interpreter 3.10 or newer, got \"$python\""
    "$python" tools/toolchain.py --values || exit 2
}

finds_header() { echo "#include <$1>" | "${CXX:-c++}" -E -x c++ "${@:2}" - >/dev/null 2>&1; }

# Debian's names of the packages that are missing.
missing_packages() {
    local interpreter=$python
    [[ ! -x .venv/bin/python ]] || interpreter=.venv/bin/python
    command -v "${CXX:-c++}" >/dev/null || echo g++
    finds_header gtest/gtest.h || echo libgtest-dev
    "$interpreter" -c 'import ensurepip' 2>/dev/null || echo python3-venv
    finds_header Python.h \
        "-I$("$interpreter" -c 'import sysconfig; print(sysconfig.get_path("include"))')" ||
        echo python3-dev
    [[ -n ${DATA:-} || -d /usr/share/datasets/fashion-mnist ]] || echo dataset-fashion-mnist
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo chromium
}

# What apt-get cannot bring is tried once, not at every start.
install_system_packages() {
    local missing as_root=() package
    missing=$(missing_packages | xargs)
    [[ -n $missing ]] || return 0
    if [[ ! -f .venv/.stamp-system || $(<.venv/.stamp-system) != "$missing" ]]; then
        ((EUID == 0)) || as_root=(sudo -n)
        if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
            say "installing system packages: $missing"
            "${as_root[@]}" apt-get update -qq </dev/null || true
            for package in $missing; do
                "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
                    apt-get install -qq -y --no-install-recommends "$package" </dev/null || true
            done
            missing=$(missing_packages | xargs)
        fi
    fi
    for package in $missing; do
        case $package in
        dataset-fashion-mnist)
            say "no $package package: \`make example\` takes scikit-learn's digits, or give DATA=" ;;
        chromium) say "no $package package: the test that looks at a report in a browser is skipped" ;;
        libgtest-dev)
            [[ $mode != --tests ]] || die "the C++ tests need GoogleTest: install $package"
            say "no $package package: building without the C++ tests" ;;
        *) die "cannot build: install $package" ;;
        esac
    done
    still_missing=$missing
}

make_venv() {
    if [[ ! -x .venv/bin/python ]]; then
        say "creating .venv"
        "$python" -m venv .venv
    elif [[ -n ${PYTHON:-} ]]; then
        local show='import sys; print("%d.%d.%d" % sys.version_info[:3])' wanted have
        wanted=$("$python" -c "$show")
        have=$(.venv/bin/python -c "$show")
        [[ $wanted == "$have" ]] ||
            die "expected PYTHON to be $have as .venv was made with, got \"$PYTHON\" ($wanted);" \
                "remove .venv to change it"
    fi
    printf '%s' "$still_missing" >.venv/.stamp-system
}

installed() { .venv/bin/python -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }

install_torch() {
    local have
    have=$(installed torch || true)
    if [[ $have != "$torch" && ${have%%+*} != "$torch" ]]; then
        say "installing torch $torch"
        .venv/bin/pip install -q "torch==$torch" numpy ||
            die "expected TORCH to be a release that pip can install, got \"$torch\""
        have=$(installed torch)
    fi
    torch=$have
}

# The first build goes through pip, for the metadata; later ones straight through CMake.
build() {
    local chosen folder nvcc stamp=.venv/.stamp-install tests=ON key tool
    chosen=$(.venv/bin/python tools/toolchain.py) || exit 2
    { read -r folder && read -r nvcc; } <<<"$chosen"$'\n'
    [[ $still_missing != *libgtest-dev* ]] || tests=OFF
    key="$folder, tests $tests, nvcc $nvcc ${CUDA_ARCH:-}, ${CMAKE_ARGS:-},"
    key+=" $(cksum pyproject.toml setup.py tools/toolchain.py | xargs)"
    if [[ ! -f build/$folder/build.ninja || ! -f $stamp || $(<"$stamp") != "$key" ]]; then
        for tool in cmake ninja; do
            command -v "$tool" >/dev/null || .venv/bin/pip install -q "$tool"
        done
        say "installing the Python packages and building for torch $torch" \
            "$([[ -z $nvcc ]] && echo without || echo with) CUDA kernels"
        .venv/bin/pip install -q "setuptools>=77"
        printf 'torch==%s\n' "$torch" >.venv/.torch # torchvision would bring a torch of its own
        CMAKE_ARGS="-DBUILD_TESTING=$tests ${CMAKE_ARGS:-}" MAX_JOBS=$jobs .venv/bin/pip install \
            -q --no-build-isolation -c .venv/.torch -e ".[workflow,test,lint,docs]"
        ln -sfn "$folder" build/current
        printf '%s' "$key" >"$stamp"
    fi
    [[ $mode != --no-compile ]] || return 0
    cmake --build "build/$folder" --parallel "$jobs"
    cmake --install "build/$folder" --prefix torch_ext >/dev/null
}

torch=${TORCH?run this through make}
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
mode=${1:-}
still_missing=
check_variables
install_system_packages
make_venv
PATH=$PATH:$PWD/.venv/bin
install_torch
build

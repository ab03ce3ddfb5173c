#!/bin/sh
# Build libgdn_ops_ort.so, the custom-op library for onnxruntime.
#
#   native/build.sh [ONNXRUNTIME INCLUDE DIRECTORY]
#
# ORT_INCLUDE, CXX and CXXFLAGS of the environment are honoured. Nothing of onnxruntime is
# linked: the library receives its functions from the process that loads it.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=$here/build
header=onnxruntime_c_api.h

# Where distributions and release archives keep the header.
find_include() {
    for dir in "$1" "$1/include" "$1/onnxruntime" "$1/include/onnxruntime" \
        "$1/include/onnxruntime/core/session"; do
        if [ -f "$dir/$header" ]; then
            echo "$dir"
            return
        fi
    done
}

given=${1:-${ORT_INCLUDE:-}}
if [ -n "$given" ]; then
    include=$(find_include "$given")
    [ -n "$include" ] || {
        echo "native/build.sh: $given has no $header, should be the include directory of" \
            "onnxruntime 1.18 or newer" >&2
        exit 1
    }
else
    include=$(find_include /usr)
    [ -n "$include" ] || include=$(find_include /usr/local)
    [ -n "$include" ] || {
        cat >&2 <<'MESSAGE'
native/build.sh: there are no onnxruntime headers in /usr/include or /usr/local/include. Either
  apt install libonnxruntime-dev         (Debian 13 and newer)
or unpack a release archive of onnxruntime (onnxruntime-linux-x64-*.tgz) and name its folder:
  make native ORT_INCLUDE=onnxruntime-linux-x64-VERSION/include
MESSAGE
        exit 1
    }
fi

mkdir -p "$out"
# Written beside and renamed: a process that has the old library loaded keeps it.
# No -ffast-math: sums over rows stay in order and -inf stays -inf. What is fused is written out.
"${CXX:-c++}" -std=c++17 -O3 -ffp-contract=off -fno-math-errno -Wall -Wextra -fPIC -shared \
    -fvisibility=hidden -isystem "$include" ${CXXFLAGS:-} \
    "$here/gated_delta_step.cc" -o "$out/libgdn_ops_ort.so.new"
mv "$out/libgdn_ops_ort.so.new" "$out/libgdn_ops_ort.so"
echo "built native/build/libgdn_ops_ort.so with the headers in $include"

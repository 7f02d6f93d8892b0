#!/usr/bin/env bash
# GCC 12.2 drops most of what a program writes into a tile configuration before it loads it.
#
# `_tile_loadconfig` reads 64 bytes. GCC 12's header tells the compiler that the instruction reads
# the first 8 only. With -O2, stores into the other bytes of a local table are dead, and are left
# out: the rows and columns of the tiles are never written. -O0 writes all of them, and so does a
# table that is `static const`. Clang 18 (in the package ziglang) writes all of them with -O2.
#
# The program is compiled to assembly and not run. It sets byte 16 to 64 and byte 48 to 16.
#
# Exits 0 while that is so, 1 once it has changed, 2 where these packages cannot be had.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
version=12.2.0-14+deb12u1
[ "$(uname -m)" = x86_64 ] || exit 2
apt-get download -qq "gcc-12=$version" "cpp-12=$version" "libgcc-12-dev=$version" >/dev/null 2>&1 || exit 2
for package in ./*.deb; do dpkg -x "$package" root; done
python3 -m venv venv
venv/bin/pip install --quiet ziglang==0.13.0

cat > shapes.c <<'C'
#include <immintrin.h>
#include <stdint.h>
void load_shapes(void) {
  uint8_t shapes[64] = {0};
  shapes[0] = 1;
  shapes[16] = 64;
  shapes[48] = 16;
  _tile_loadconfig(shapes);
}
C
gcc=root/usr/lib/gcc/x86_64-linux-gnu/12
gnu() { "$gcc/cc1" -quiet -isystem "$gcc/include" -isystem /usr/include \
  -isystem /usr/include/x86_64-linux-gnu -mamx-tile "$1" -o "$2" shapes.c; }
gnu -O2 gcc-O2.s
gnu -O0 gcc-O0.s
venv/bin/python -m ziglang cc -target x86_64-linux-musl -mcpu=x86_64+amx_tile -O2 -S -o clang-O2.s shapes.c 2>/dev/null

# A byte of 64 or 16 that is stored, by itself or within a constant.
stores() { grep -Ec 'mov(b|l|q|abs)?[[:space:]]+\$(64|16),' "$1" || true; }
echo "gcc $version: of 2 stores, -O0 keeps $(stores gcc-O0.s), -O2 keeps $(stores gcc-O2.s)"
echo "ziglang 0.13.0 (clang 18): of 2 stores, -O2 keeps $(stores clang-O2.s)"
grep -q ldtilecfg gcc-O2.s && grep -q ldtilecfg clang-O2.s || exit 1
[ "$(stores gcc-O0.s)" = 2 ] && [ "$(stores gcc-O2.s)" = 0 ] && [ "$(stores clang-O2.s)" = 2 ]

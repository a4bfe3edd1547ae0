/* The one inner loop of all products: a tile of TILE_ROWS x TILE_COLUMNS held in registers. */
#ifndef LOOPOS_TILE_H
#define LOOPOS_TILE_H

#include "simd.h"

/* acc[i][j] += sum over p < k, in order, of a[i * a_row + p * a_col] * b[p * b_row + lanes of j],
   for `rows` rows and `vectors` vectors, both constants where this is inlined. */
INLINE void tile_multiply(int rows, int vectors, long k, const float *RESTRICT a, long a_row,
                          long a_col, const float *RESTRICT b, long b_row,
                          vec acc[TILE_ROWS][TILE_VECTORS]) {
    /* Every third row has a pointer: few enough for the registers, with a_row as the index. */
    const float *base[(TILE_ROWS + 2) / 3];
    _Pragma("GCC unroll 4") for (int i = 0; i < (TILE_ROWS + 2) / 3; i++) base[i] = a + 3 * i * a_row;
    for (long p = 0; p < k; p++) {
        vec right[TILE_VECTORS];
        _Pragma("GCC unroll 2") for (int j = 0; j < vectors; j++) right[j] = load(b + j * LANES);
        _Pragma("GCC unroll 12") for (int i = 0; i < rows; i++) {
            vec left = splat(base[i / 3][i % 3 * a_row]);
            _Pragma("GCC unroll 2") for (int j = 0; j < vectors; j++) acc[i][j] += left * right[j];
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < (TILE_ROWS + 2) / 3; i++) base[i] += a_col;
        b += b_row;
    }
}

/* Calls f(rows) with `rows` a constant, for 1 <= count <= TILE_ROWS. */
#if TILE_ROWS == 12
#define FOR_ROWS(count, f) \
    switch (count) { \
    case 1: f(1); break; case 2: f(2); break; case 3: f(3); break; case 4: f(4); break; \
    case 5: f(5); break; case 6: f(6); break; case 7: f(7); break; case 8: f(8); break; \
    case 9: f(9); break; case 10: f(10); break; case 11: f(11); break; default: f(12); \
    }
#else
#define FOR_ROWS(count, f) \
    switch (count) { \
    case 1: f(1); break; case 2: f(2); break; case 3: f(3); break; case 4: f(4); break; \
    case 5: f(5); break; default: f(6); \
    }
#endif

#endif

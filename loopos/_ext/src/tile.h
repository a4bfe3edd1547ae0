/* The one inner loop of all products: a tile of TILE_ROWS x TILE_COLUMNS held in registers. */
#ifndef LOOPOS_TILE_H
#define LOOPOS_TILE_H

#include "simd.h"

/* Cache lines that will be needed soon: `rows` rows of `row_bytes`, `stride` bytes apart. A product
   asks for a few of them at a time while it computes, so that memory and arithmetic overlap. */
typedef struct {
    const char *row;
    long at, row_bytes, stride, rows;
} lines_ahead;

/* Whether streams from memory are asked for in time: where AVX-512 was measured, on one of Intel's, up
   to half is gained; where AVX2 was, on one of AMD's, nothing. */
#define ASK_AHEAD (LANES == 16)

/* Depth between two looks ahead, and lines asked for at each. */
#define AHEAD_DEPTH 32
#define AHEAD_LINES 8

INLINE void look_ahead(lines_ahead *lines, long count) {
    for (long i = 0; i < count && lines->rows > 0; i++) {
        __builtin_prefetch(lines->row + lines->at, 0, 2);
        lines->at += 64;
        if (lines->at >= lines->row_bytes) {
            lines->at = 0;
            lines->row += lines->stride;
            lines->rows--;
        }
    }
}

/* acc[i][j] += sum over p < k, in order, of a[i * a_row + p * a_col] * b[p * b_row + lanes of j],
   for `rows` rows and `vectors` vectors, both constants where this is inlined. */
INLINE void tile_multiply(int rows, int vectors, long k, const float *RESTRICT a, long a_row,
                          long a_col, const float *RESTRICT b, long b_row,
                          vec acc[TILE_ROWS][TILE_VECTORS]) {
    /* Every third row has a pointer: few enough for the registers, with a_row as the index. */
    const float *base[(TILE_ROWS + 2) / 3];
    UNROLL(4) for (int i = 0; i < (TILE_ROWS + 2) / 3; i++) base[i] = a + 3 * i * a_row;
    UNROLL_DEPTH for (long p = 0; p < k; p++) {
        vec right[TILE_VECTORS];
        UNROLL(2) for (int j = 0; j < vectors; j++) right[j] = load(b + j * LANES);
        UNROLL(12) for (int i = 0; i < rows; i++) {
            vec left = splat(base[i / 3][i % 3 * a_row]);
            UNROLL(2) for (int j = 0; j < vectors; j++) acc[i][j] += left * right[j];
            IN_ORDER(i);
        }
        UNROLL(4) for (int i = 0; i < (TILE_ROWS + 2) / 3; i++) base[i] += a_col;
        b += b_row;
    }
}

/* The same, looking ahead on the way: first to where the tile will be stored, then to `lines`. */
INLINE void tile_multiply_ahead(int rows, int vectors, long k, const float *RESTRICT a, long a_row,
                                long a_col, const float *RESTRICT b, long b_row,
                                vec acc[TILE_ROWS][TILE_VECTORS], const float *c, long c_row,
                                lines_ahead *lines) {
    int fetched = 0;
    for (long p = 0; p < k; p += AHEAD_DEPTH) {
        long depth = k - p < AHEAD_DEPTH ? k - p : AHEAD_DEPTH;
        if (fetched < rows)
            for (int i = 0; i < AHEAD_LINES / 2 && fetched < rows; i++, fetched++) {
                __builtin_prefetch(c + fetched * c_row, 1, 3);
                __builtin_prefetch(c + fetched * c_row + TILE_COLUMNS - 1, 1, 3);
            }
        else
            look_ahead(lines, AHEAD_LINES);
        tile_multiply(rows, vectors, depth, a + p * a_col, a_row, a_col, b + p * b_row, b_row, acc);
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

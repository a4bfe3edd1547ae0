/* What attention is made of: products of tiles, rows packed. */
#ifndef LOOPOS_ATTENTION_TILES_H
#define LOOPOS_ATTENTION_TILES_H

#include "attention_view.h"
#include "tile.h"

/* -- products of tiles -------------------------------------------------------------------------- */

enum tile_mode { TILE_FRESH, TILE_ADDED, TILE_SCALED };

/* c (n columns) = A B; or that added to c, or to c * factor. */
INLINE void attention_tile(int rows, int vectors, long k, const float *a, long a_row, long a_col,
                           const float *b, long b_row, float *c, long c_row, long n, int mode,
                           const vec *factor) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    int full = n == vectors * LANES;
    if (mode == TILE_FRESH) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++) acc[i][j] = (vec){0};
    } else if (mode == TILE_SCALED) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                acc[i][j] = load(c + i * c_row + j * LANES) * factor[j];
    } else if (full) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                acc[i][j] = load(c + i * c_row + j * LANES);
    } else {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                acc[i][j] = load_part(c + i * c_row + j * LANES, n - j * LANES);
    }
    tile_multiply(rows, vectors, k, a, a_row, a_col, b, b_row, acc);
    if (full) {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                store(c + i * c_row + j * LANES, acc[i][j]);
    } else {
        UNROLL(12) for (int i = 0; i < rows; i++)
            UNROLL(2) for (int j = 0; j < vectors; j++)
                store_part(c + i * c_row + j * LANES, acc[i][j], n - j * LANES);
    }
}

/* Tiles of up to TILE_ROWS rows; by_rows: rows of A are a_step apart, else its columns are. */
#define ATTENTION_TILES(name, vectors, by_rows) \
    static __attribute__((noinline)) void name( \
        int rows, long k, const float *a, long a_step, const float *b, long b_row, float *c, \
        long c_row, long n, int mode, const vec *factor) { \
        switch (rows) { \
            ATTENTION_CASES(vectors, by_rows) \
        } \
    }
#define ATTENTION_CASE(rows, vectors, by_rows) \
    case rows: \
        attention_tile(rows, vectors, k, a, by_rows ? a_step : 1, by_rows ? 1 : a_step, b, b_row, \
                       c, c_row, n, mode, factor); \
        break;
#define ATTENTION_CASES_6(v, r) \
    ATTENTION_CASE(1, v, r) ATTENTION_CASE(2, v, r) ATTENTION_CASE(3, v, r) \
    ATTENTION_CASE(4, v, r) ATTENTION_CASE(5, v, r) ATTENTION_CASE(6, v, r)
#if TILE_ROWS == 12
#define ATTENTION_CASES(v, r) \
    ATTENTION_CASES_6(v, r) \
    ATTENTION_CASE(7, v, r) ATTENTION_CASE(8, v, r) ATTENTION_CASE(9, v, r) \
    ATTENTION_CASE(10, v, r) ATTENTION_CASE(11, v, r) ATTENTION_CASE(12, v, r)
#else
#define ATTENTION_CASES(v, r) ATTENTION_CASES_6(v, r)
#endif
ATTENTION_TILES(by_rows_1, 1, 1)
ATTENTION_TILES(by_rows_2, 2, 1)
ATTENTION_TILES(by_columns_1, 1, 0)
ATTENTION_TILES(by_columns_2, 2, 0)

/* C[rows, width of `vectors`] from A[i, p] = a[i * a_step + p]. */
static void rows_times(long rows, int vectors, long k, const float *a, long a_step, const float *b,
                       long b_row, float *c, long c_row, int mode) {
    for (long i = 0; i < rows; i += TILE_ROWS) {
        int height = (int)least(rows - i, TILE_ROWS);
        (vectors == 2 ? by_rows_2 : by_rows_1)(height, k, a + i * a_step, a_step, b, b_row,
                                               c + i * c_row, c_row, vectors * LANES, mode, NULL);
    }
}

/* C[rows, n] from A[i, p] = a[i + p * a_step]. */
static void columns_times(long rows, int vectors, long k, const float *a, long a_step,
                          const float *b, long b_row, float *c, long c_row, long n, int mode,
                          const vec *factor) {
    for (long i = 0; i < rows; i += TILE_ROWS) {
        int height = (int)least(rows - i, TILE_ROWS);
        (vectors == 2 ? by_columns_2 : by_columns_1)(height, k, a + i, a_step, b, b_row,
                                                     c + i * c_row, c_row, n, mode, factor);
    }
}

/* -- what is hidden ------------------------------------------------------------------------------ */

/* Set scores [keys][row] of what is hidden to a value. */
static void hide(const attention_view *w, long i, long n, int vectors, long lo, long hi,
                 float *scores, long row, float value) {
    long first = i + w->shift, last = first + n - 1;
    for (long key = lo; key < hi; key++, scores += row) {
        int ahead = w->causal && key > first;
        int far = w->window && (last - key >= w->window || key - first >= w->window);
        if (!ahead && !far) continue;
        for (int j = 0; j < vectors; j++) {
            float *at = scores + j * LANES;
            store(at, where(hidden_lanes(w, first + j * LANES - key), splat(value), load(at)));
        }
    }
}

/* -- blocks of rows ----------------------------------------------------------------------------- */

/* panel[p][j] = factor * x[j * row + p] for n <= width rows of d; 0 in the lanes beyond n. */
static void pack_lanes(const float *x, long row, long n, long d, float factor, int vectors,
                       float *RESTRICT panel) {
    long width = vectors * LANES;
    for (long j0 = 0; j0 < width; j0 += LANES)
        for (long p = 0; p < d; p += LANES) {
            long depth = least(d - p, LANES);
            vec rows[LANES];
            if (n - j0 >= LANES && depth == LANES) {
                UNROLL(16) for (int j = 0; j < LANES; j++) rows[j] =
                    load(x + (j0 + j) * row + p) * factor;
            } else {
                for (int j = 0; j < LANES; j++)
                    rows[j] = j0 + j < n ? load_part(x + (j0 + j) * row + p, depth) * factor
                                         : (vec){0};
            }
            transpose(rows);
            if (depth == LANES) {
                UNROLL(16) for (int i = 0; i < LANES; i++)
                    store(panel + (p + i) * width + j0, rows[i]);
            } else {
                for (int i = 0; i < depth; i++) store(panel + (p + i) * width + j0, rows[i]);
            }
        }
}

/* Rows of d, `row` apart, to rows of `padded`, zeros beyond d. */
static void copy_rows(const float *x, long row, long n, long d, float *RESTRICT to, long padded) {
    for (long i = 0; i < n; i++, x += row, to += padded)
        for (long p = 0; p < padded; p += LANES) store(to + p, load_part(x + p, most(d - p, 0)));
}

#endif

/* What attention is made of where AMX multiplies: products in squares of 32, numbers in three parts (see
   tile_split.c.inc), and what vectors do meanwhile. */
#ifndef LOOPOS_ATTENTION_SQUARES_H
#define LOOPOS_ATTENTION_SQUARES_H

#include "attention_view.h"

#define SQUARE 32

/* Work for vectors, one row after the other, while AMX's unit is busy; and rows to ask for, so many at a time. */
typedef struct side_work {
    void (*make)(struct side_work *work, int row);
    int row, rows; /* the next, and how many there are */
    fetch_list *ahead;
} side_work;
#define ROWS_BETWEEN 2

INLINE void work_aside(side_work *work) {
    if (work->row < work->rows) work->make(work, work->row++);
    fetch_some(work->ahead, ROWS_BETWEEN);
}
INLINE void finish_work(side_work *work) {
    while (work->row < work->rows) work->make(work, work->row++);
}

/* Whether a square of `rows` keys has numbers that are not to count. */
INLINE int some_hidden(const attention_view *w, long query, long key, long rows) {
    long first = query + w->shift - key, far = SQUARE - 1;
    return rows < SQUARE || (w->causal && first < far) ||
           (w->window && (first + far >= w->window || far - first >= w->window));
}

/* Of the queries one after the other from `query` on, those to which a key does not count. */
INLINE ivec hidden_keys(const attention_view *w, long query, long key) {
    return key < w->keys ? hidden_lanes(w, query + w->shift - key) : ~(ivec){0};
}

enum { SQUARE_FRESH, SQUARE_WHOLE, SQUARE_ADDED };

INLINE void square_steps(int rows, int columns, long steps, const float *a, long a_strip, const float *b,
                         long b_strip, side_work *aside) {
    for (; steps > 0; steps--, a += STEP_FLOATS, b += STEP_FLOATS) MULTIPLY_STEP(work_aside(aside));
}

/* A square of sums of products to `to`; whole: zeros where there are no rows or columns; added: to what
   is there. */
static __attribute__((noinline)) void
multiply_square(side_work *aside, long rows, long columns, long steps, const float *a, long a_strip,
                const float *b, long b_strip, int mode, float *to, long row) {
    int low = rows > STRIP, right = columns > STRIP;
    __asm__ __volatile__("" : : : "memory"); /* operands are in memory before tiles are loaded */
    if (mode == SQUARE_ADDED) {
        _tile_loadd(0, to, row * 4);
        if (right) _tile_loadd(1, to + STRIP, row * 4);
        if (low) _tile_loadd(2, to + STRIP * row, row * 4);
        if (low && right) _tile_loadd(3, to + STRIP * row + STRIP, row * 4);
    } else {
        zero_tiles();
    }
    if (low && right)
        square_steps(2, 2, steps, a, a_strip, b, b_strip, aside);
    else if (low)
        square_steps(2, 1, steps, a, a_strip, b, b_strip, aside);
    else if (right)
        square_steps(1, 2, steps, a, a_strip, b, b_strip, aside);
    else
        square_steps(1, 1, steps, a, a_strip, b, b_strip, aside);
    if (mode == SQUARE_WHOLE) low = right = 1;
    _tile_stored(0, to, row * 4);
    if (right) _tile_stored(1, to + STRIP, row * 4);
    if (low) _tile_stored(2, to + STRIP * row, row * 4);
    if (low && right) _tile_stored(3, to + STRIP * row + STRIP, row * 4);
    __asm__ __volatile__("" : : : "memory");
}

/* Whether some of `n` rows of d are numbers that are made again. */
static int rows_not_served(const float *x, long row, long n, long d) {
    ivec again = {0};
    for (long i = 0; i < n; i++, x += row)
        for (long p = 0; p < d; p += LANES) again |= not_served(load_part(x + p, d - p));
    return any(again);
}

/* Up to 32 rows of d as operands: strips of a left or right one whose depth is d, and, `strip` floats apart,
   a step of one whose depth are the rows. (A few rows at a time: they stay in the first cache.) */
static void pack_rows(const float *x, long row, long n, long d, int left, float *by_d, float *by_rows,
                      long strip) {
    if (by_d && left)
        pack_strips(1, 1, x, row, n, d, by_d);
    else if (by_d)
        pack_strips(1, 0, x, row, n, d, by_d);
    for (long p = 0; by_rows && p < d; p += STRIP, by_rows += strip)
        if (left)
            pack_step(0, 1, x + p, row, d - p, n, NULL, by_rows);
        else
            pack_step(0, 0, x + p, row, d - p, n, NULL, by_rows);
}

#endif

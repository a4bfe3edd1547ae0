/* What attention is at any instruction set: who sees whom, and how its work is cut into tasks. */
#ifndef LOOPOS_ATTENTION_VIEW_H
#define LOOPOS_ATTENTION_VIEW_H

#include "math.h.inc"

#include <stdlib.h>

/* Queries of a task: packed together, so that a block of keys is fetched once for all. */
#define GROUP_QUERIES 128
#define GROUP_PANELS (GROUP_QUERIES / TILE_COLUMNS)
/* Keys between two corrections of the running maximum: whole tiles of them. */
#define FORWARD_KEYS 96
/* Keys whose gradients are held while the queries go by. */
#define BACKWARD_KEYS(d) ((d) <= 128 ? 192 : 96)
/* A thread takes tasks one after the other, and fetches for the second of the next (for the first it
   was slower). Rows to fetch with each tile of keys; and the longest sequence of which that is done: more
   would not stay in the cache. */
#define TASKS_AHEAD 2
#define FETCHED_ROWS (TILE_COLUMNS / 2 + 4)
#define FETCHED_LENGTH 256
/* Below every score that is a number, and finite: a difference to it is never NaN. */
#define NO_SCORE (-3e38f)

/* -- vectors ------------------------------------------------------------------------------------ */

/* The larger; b where a is NaN. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vec)_mm_max_ps((__m128)a, (__m128)b);
#else
    return where(a > b, a, b);
#endif
}

INLINE ivec lane_numbers(void) {
    ivec v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long lanes_above(long n) { return (n + LANES - 1) / LANES * LANES; }

/* -- rows fetched -------------------------------------------------------------------------------- */

/* Ask for `n` rows of d that are wanted soon: they lie too far apart for the processor to guess. */
INLINE void fetch_rows(const float *x, long row, long n, long d) {
    for (long i = 0; i < n; i++, x += row)
        for (long p = 0; p < d; p += 16) __builtin_prefetch(x + p, 0, 2);
}

/* What the next task will touch, asked for bit by bit while this one computes. */
typedef struct {
    struct {
        const float *x;
        long row, rows;
    } parts[7];
    int count, part;
    long at, d;
} fetch_list;

INLINE void fetch_later(fetch_list *list, const float *x, long row, long rows) {
    list->parts[list->count].x = x;
    list->parts[list->count].row = row;
    list->parts[list->count++].rows = rows;
}

INLINE void fetch_some(fetch_list *list, long rows) {
    while (rows > 0 && list->part < list->count) {
        long row = list->parts[list->part].row, left = list->parts[list->part].rows - list->at;
        fetch_rows(list->parts[list->part].x + list->at * row, row, least(rows, left), list->d);
        list->at += least(rows, left);
        if (left <= rows) list->part++, list->at = 0;
        rows -= left;
    }
}

/* -- one head of one sequence ------------------------------------------------------------------- */

typedef struct {
    long d, q_row, k_row; /* floats from a token to the next */
    const float *q, *k, *v;
    float *y, *lse;
    long lse_row;
    long queries, keys, shift; /* query i stands at position i + shift */
    int causal;
    long window; /* 0: none */
    float scale;
    const loopos_attention *dropout; /* NULL: none */
    uint64_t sample, channel;
    fetch_list *ahead;
} attention_view;

INLINE uint64_t mix_bits(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
#define GOLDEN 0x9E3779B97F4A7C15u

/* The keys [lo, hi) that some of the queries [i, i + n) see. */
INLINE void visible_keys(const attention_view *w, long i, long n, long *lo, long *hi) {
    long first = i + w->shift, last = first + n - 1;
    *lo = w->window ? most(0, first - w->window + 1) : 0;
    *hi = w->causal ? least(last + 1, w->keys) : w->keys;
    if (w->window && !w->causal) *hi = least(w->keys, last + w->window);
}

/* Of the queries one after the other that begin so far after a key, those that do not see it. */
INLINE ivec hidden_lanes(const attention_view *w, long from_key) {
    ivec distance = lane_numbers() + (int32_t)from_key;
    ivec hidden = w->causal ? distance < 0 : (ivec){0};
    if (w->window)
        hidden |= (distance >= (int32_t)w->window) | (distance <= (int32_t)-w->window);
    return hidden;
}

/* Dropout factors [keys][width]: a function of sample, position, head and key alone. */
static void keep_factors(const attention_view *w, long i, long width, long lo, long hi,
                         float *RESTRICT keep, long row) {
    uint64_t rows[TILE_COLUMNS];
    for (long j = 0; j < width; j++)
        rows[j] = mix_bits(w->sample + (uint64_t)(i + j + w->shift) * GOLDEN);
    for (long key = lo; key < hi; key++, keep += row) {
        uint64_t channel = (w->channel + (uint64_t)key + 1) * GOLDEN;
        for (long j = 0; j < width; j++)
            keep[j] = mix_bits(rows[j] + channel) >> 32 >= w->dropout->threshold
                          ? w->dropout->kept : 0.0f;
    }
}

typedef struct {
    float *q, *out; /* [d][width] */
    long i, n;
    int vectors;
    vec top[TILE_VECTORS], total[TILE_VECTORS];
} query_panel;

/* Divide by the sums, turn round and store; log-sum-exp. */
static void panel_finish(const attention_view *w, const query_panel *panel) {
    long width = panel->vectors * LANES;
    for (int j = 0; j < panel->vectors; j++) {
        long lanes = least(panel->n - j * LANES, LANES);
        float *y = w->y + (panel->i + j * LANES) * w->q_row;
        vec inverse = splat(1.0f) / panel->total[j];
        for (long p = 0; p < w->d; p += LANES) {
            long depth = least(w->d - p, LANES);
            vec rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = i < depth ? load(panel->out + (p + i) * width + j * LANES) * inverse
                                    : (vec){0};
            transpose(rows);
            for (int i = 0; i < lanes; i++) store_part(y + i * w->q_row + p, rows[i], depth);
        }
        if (w->lse == NULL) continue;
        for (int i = 0; i < lanes; i++)
            w->lse[(panel->i + j * LANES + i) * w->lse_row] =
                panel->top[j][i] + logf(panel->total[j][i]);
    }
}

/* -- jobs --------------------------------------------------------------------------------------- */

typedef struct {
    int32_t sequence, head;
    long first; /* query */
    double cost;
} attention_task;

typedef struct {
    const loopos_attention *p;
    attention_task *tasks;
    long count, group; /* tasks; forward: queries of each */
    float *delta;      /* backward: [n, heads] */
} attention_job;

/* The dearest first, so that the last to be taken are small; equals keep their order. */
static int by_cost(const void *left, const void *right) {
    const attention_task *a = left, *b = right;
    if (a->cost != b->cost) return a->cost < b->cost ? 1 : -1;
    if (a->sequence != b->sequence) return a->sequence < b->sequence ? -1 : 1;
    if (a->head != b->head) return a->head < b->head ? -1 : 1;
    return a->first < b->first ? -1 : a->first > b->first;
}

static attention_view head_view(const loopos_attention *p, long sequence, long head) {
    long start = p->offsets[sequence], group = p->heads / p->kv_heads;
    uint64_t sample = p->samples ? (uint64_t)p->samples[sequence] : (uint64_t)sequence;
    long q = start * p->heads + head, k = start * p->kv_heads + head / group;
    return (attention_view){
        .d = p->d, .q_row = p->heads * p->d, .k_row = p->kv_heads * p->d,
        .q = p->q + q * p->d, .k = p->k + k * p->d, .v = p->v + k * p->d,
        .y = p->y + q * p->d, .lse = p->lse + q, .lse_row = p->heads,
        .queries = p->offsets[sequence + 1] - start, .keys = p->offsets[sequence + 1] - start,
        .causal = p->causal, .window = p->window, .scale = p->scale,
        .dropout = p->threshold ? p : NULL,
        .sample = mix_bits(sample * GOLDEN + p->key), .channel = (uint64_t)head << 32,
    };
}

/* delta = sum of dy * y, per query. */
static void delta_run(void *context, long index, void *scratch) {
    const attention_job *job = context;
    const loopos_attention *p = job->p;
    long rows = p->n * p->heads;
    (void)scratch;
    for (long row = index * 256; row < least((index + 1) * 256, rows); row++) {
        const float *dy = p->dy + row * p->d, *y = p->y + row * p->d;
        vec sum = {0};
        for (long i = 0; i < p->d; i += LANES)
            sum += load_part(dy + i, p->d - i) * load_part(y + i, p->d - i);
        job->delta[row] = sum_lanes(sum);
    }
}

/* How one level computes some queries, and a task of the backward pass, and the floats they need: another
   level may leave them to it. */
typedef struct {
    void (*forward_group)(const attention_view *w, long i, long count, float *scratch);
    size_t (*forward_floats)(long d);
    loopos_task backward_run;
    size_t (*backward_floats)(long d);
} attention_runs;
extern const attention_runs loopos_attention_v4;

/* The task after the next, if sequences are so short that what it will touch may be asked for. */
INLINE const attention_task *task_ahead(const attention_job *job, long index) {
    const int32_t *start = job->p->offsets + job->tasks[index].sequence;
    if (start[1] - start[0] > FETCHED_LENGTH || index + TASKS_AHEAD >= job->count) return NULL;
    return &job->tasks[index + TASKS_AHEAD];
}

/* List what it begins with: of the forward pass, and of the backward. */
static void forward_ahead(const attention_job *job, long index, fetch_list *ahead) {
    const loopos_attention *p = job->p;
    const attention_task *task = task_ahead(job, index);
    if (task == NULL) return;
    attention_view w = head_view(p, task->sequence, task->head);
    long queries = least(w.queries - task->first, GROUP_QUERIES), at = task->first * w.q_row;
    ahead->d = w.d;
    fetch_later(ahead, w.k, w.k_row, least(w.keys, FORWARD_KEYS));
    fetch_later(ahead, w.v, w.k_row, least(w.keys, FORWARD_KEYS));
    fetch_later(ahead, w.q + at, w.q_row, queries);
    fetch_later(ahead, w.y + at, w.q_row, queries);
}

static void backward_ahead(const attention_job *job, long index, fetch_list *ahead) {
    const loopos_attention *p = job->p;
    const attention_task *task = task_ahead(job, index);
    if (task == NULL) return;
    long head = task->head * (p->heads / p->kv_heads);
    attention_view w = head_view(p, task->sequence, head);
    long queries = least(w.queries, GROUP_QUERIES), keys = least(w.keys, BACKWARD_KEYS(w.d));
    ahead->d = w.d;
    fetch_later(ahead, w.k, w.k_row, keys);
    fetch_later(ahead, w.v, w.k_row, keys);
    fetch_later(ahead, w.q, w.q_row, queries);
    fetch_later(ahead, p->dy + (w.q - p->q), w.q_row, queries);
    fetch_later(ahead, p->dq + (w.q - p->q), w.q_row, queries);
    fetch_later(ahead, p->dk + (w.k - p->k), w.k_row, keys);
    fetch_later(ahead, p->dv + (w.k - p->k), w.k_row, keys);
}

/* Run a task for each `group` of queries of each head and sequence. */
static int forward_job(int threads, const loopos_attention *p, long group, loopos_task run,
                       size_t floats) {
    attention_job job = {.p = p, .group = group};
    for (long b = 0; b < p->sequences; b++)
        job.count += (p->offsets[b + 1] - p->offsets[b] + group - 1) / group;
    job.count *= p->heads;
    if (job.count == 0) return 0;
    job.tasks = loopos_take((size_t)job.count * sizeof *job.tasks);
    if (job.tasks == NULL) return -1;
    attention_task *next = job.tasks;
    for (long b = 0; b < p->sequences; b++)
        for (long head = 0; head < p->heads; head++) {
            attention_view w = head_view(p, b, head);
            for (long first = 0; first < w.queries; first += group) {
                long count = least(w.queries - first, group), lo, hi;
                visible_keys(&w, first, count, &lo, &hi);
                *next++ = (attention_task){(int32_t)b, (int32_t)head, first,
                                           (double)count * (double)(hi - lo)};
            }
        }
    qsort(job.tasks, (size_t)job.count, sizeof *job.tasks, by_cost);
    int status = loopos_parallel(threads, job.count, floats * 4, run, &job);
    loopos_give(job.tasks);
    return status;
}

/* Run a task for each head of keys of each sequence. */
static int backward_job(int threads, const loopos_attention *p, loopos_task run, size_t floats) {
    attention_job job = {.p = p, .count = p->sequences * p->kv_heads};
    long rows = p->n * p->heads;
    if (rows == 0) {
        size_t bytes = (size_t)(p->n * p->kv_heads * p->d) * 4;
        if (bytes) memset(p->dk, 0, bytes), memset(p->dv, 0, bytes);
        return 0;
    }
    job.tasks = loopos_take((size_t)job.count * sizeof *job.tasks);
    job.delta = loopos_take((size_t)rows * 4);
    int status = -1;
    if (job.tasks != NULL && job.delta != NULL) {
        for (long b = 0; b < p->sequences; b++)
            for (long head = 0; head < p->kv_heads; head++) {
                double length = p->offsets[b + 1] - p->offsets[b];
                double seen = p->window && p->window < length ? (double)p->window : length;
                job.tasks[b * p->kv_heads + head] =
                    (attention_task){(int32_t)b, (int32_t)head, 0, length * seen};
            }
        qsort(job.tasks, (size_t)job.count, sizeof *job.tasks, by_cost);
        status = loopos_parallel(threads, (rows + 255) / 256, 0, delta_run, &job);
        if (status == 0)
            status = loopos_parallel(threads, job.count, floats * 4, run, &job);
    }
    if (job.tasks != NULL) loopos_give(job.tasks);
    if (job.delta != NULL) loopos_give(job.delta);
    return status;
}

#endif

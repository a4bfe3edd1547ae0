/* The machine's limits in float32: multiply-adds a second, and bytes of memory a second.

   machine THREADS MEBIBYTES TRIALS  prints one JSON object: fma_flops (2 a multiply-add), and
   update, read and copy, in bytes a second; each is the best trial. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* Two units with a latency of four or five cycles need ten chains or more; all stay in registers. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define CHAINS 12
#define LANES (VECTOR_BYTES / 4)
#define MOST_THREADS 1024

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));

static const long FMA_ROUNDS = 4000000;
static volatile float factor = 0.999f, addend = 0.001f, sink[MOST_THREADS];
static float *p, *g, *m, *v;
static long count;
static int threads;

static void fma_chains(int me) {
    vec a, b, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11;
    for (int i = 0; i < LANES; i++) {
        a[i] = factor;
        b[i] = addend;
        c0[i] = addend * (float)i;
    }
    c1 = c0 + b, c2 = c1 + b, c3 = c2 + b, c4 = c3 + b, c5 = c4 + b, c6 = c5 + b;
    c7 = c6 + b, c8 = c7 + b, c9 = c8 + b, c10 = c9 + b, c11 = c10 + b;
    for (long round = 0; round < FMA_ROUNDS; round++) {
        c0 = c0 * a + b, c1 = c1 * a + b, c2 = c2 * a + b, c3 = c3 * a + b;
        c4 = c4 * a + b, c5 = c5 * a + b, c6 = c6 * a + b, c7 = c7 * a + b;
        c8 = c8 * a + b, c9 = c9 * a + b, c10 = c10 * a + b, c11 = c11 * a + b;
    }
    c0 += c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + c10 + c11;
    for (int i = 0; i < LANES; i++) sink[me] += c0[i];
}

static void part(int me, long *from, long *to) {
    *from = count / LANES * me / threads * LANES;
    *to = count / LANES * (me + 1) / threads * LANES;
}

static void touch(int me) { /* each thread brings in the pages that it will read */
    long from, to;
    part(me, &from, &to);
    for (long i = from; i < to; i++) p[i] = g[i] = m[i] = v[i] = 0.5f;
}

static void update(int me) { /* the traffic of AdamW: reads p, g, m, v; writes p, m, v */
    long from, to;
    part(me, &from, &to);
    float *restrict pp = p, *restrict gg = g, *restrict mm = m, *restrict vv = v;
    for (long i = from; i < to; i++) {
        mm[i] = 0.9f * mm[i] + 0.1f * gg[i];
        vv[i] = 0.9f * vv[i] + 0.1f * gg[i] * gg[i];
        pp[i] = 0.9f * pp[i] + 0.1f * mm[i] * vv[i];
    }
}

static void read_all(int me) {
    long from, to;
    part(me, &from, &to);
    const vec *x0 = (const vec *)(p + from), *x1 = (const vec *)(g + from);
    const vec *x2 = (const vec *)(m + from), *x3 = (const vec *)(v + from);
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (long i = 0; i < (to - from) / LANES; i++) s0 += x0[i], s1 += x1[i], s2 += x2[i], s3 += x3[i];
    s0 += s1 + s2 + s3;
    for (int i = 0; i < LANES; i++) sink[me] += s0[i];
}

static void copy(int me) {
    long from, to;
    part(me, &from, &to);
    memcpy(p + from, g + from, (size_t)(to - from) * 4);
    memcpy(m + from, v + from, (size_t)(to - from) * 4);
}

typedef struct {
    int me;
    void (*work)(int);
} job;

static void *enter(void *given) {
    job *mine = given;
    mine->work(mine->me);
    return NULL;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of the fastest of some runs on all threads at once. */
static double fastest(void (*work)(int), int trials) {
    static pthread_t ids[MOST_THREADS];
    static job jobs[MOST_THREADS];
    double best = 1e30;
    for (int trial = 0; trial < trials; trial++) {
        double start = now();
        for (int t = 0; t < threads; t++) {
            jobs[t] = (job){t, work};
            if (pthread_create(&ids[t], NULL, enter, &jobs[t])) {
                fprintf(stderr, "cannot start thread %d\n", t);
                exit(1);
            }
        }
        for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
        double spent = now() - start;
        if (spent < best) best = spent;
    }
    return best;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    threads = atoi(argv[1]);
    int trials = atoi(argv[3]);
    if (threads < 1 || threads > MOST_THREADS || trials < 1) return 2;
    count = atol(argv[2]) * 1048576 / 16 / LANES * LANES; /* floats in each of four arrays */
    float **arrays[] = {&p, &g, &m, &v};
    for (int k = 0; k < 4; k++) {
        if (posix_memalign((void **)arrays[k], 2 << 20, (size_t)count * 4)) {
            fprintf(stderr, "no memory for %s MiB\n", argv[2]);
            return 1;
        }
#if defined(MADV_HUGEPAGE) /* as large arrays of NumPy and of the kernels lie */
        madvise(*arrays[k], (size_t)count * 4, MADV_HUGEPAGE);
#endif
    }
    double floats = (double)count;
    double flops = 2.0 * CHAINS * LANES * (double)FMA_ROUNDS * threads / fastest(fma_chains, 2 * trials);
    fastest(touch, 1);
    double updated = 28 * floats / fastest(update, trials);
    double read = 16 * floats / fastest(read_all, trials);
    double copied = 16 * floats / fastest(copy, trials);
    printf("{\"fma_flops\": %.6g, \"update\": %.6g, \"read\": %.6g, \"copy\": %.6g}\n", flops, updated,
           read, copied);
    return 0;
}

/* One pool of threads for the process: started when first needed, asleep when there is nothing to
   do, shared by all callers, started anew in a forked child. */
#include "loopos.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define MAX_THREADS 256
/* How long an idle worker looks for the next job before it sleeps. */
#define SPIN_NS 1000000
/* Looks at a counter before the time slice is offered to others. */
#define TURNS 4096

/* Rounding and the treatment of subnormal numbers, as the calling thread has them. */
#if defined(__x86_64__)
typedef unsigned arithmetic_t;
#define ARITHMETIC 0xffc0u /* of MXCSR; below are flags, which are each thread's own */
static inline arithmetic_t get_arithmetic(void) { return __builtin_ia32_stmxcsr() & ARITHMETIC; }
static inline void set_arithmetic(arithmetic_t to) {
    unsigned now = __builtin_ia32_stmxcsr();
    if ((now & ARITHMETIC) != to) __builtin_ia32_ldmxcsr((now & ~ARITHMETIC) | to);
}
#elif defined(__aarch64__)
typedef unsigned long arithmetic_t;
static inline arithmetic_t get_arithmetic(void) {
    arithmetic_t now;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(now));
    return now;
}
static inline void set_arithmetic(arithmetic_t to) {
    if (get_arithmetic() != to) __asm__ __volatile__("msr fpcr, %0" : : "r"(to));
}
#else
typedef int arithmetic_t;
static inline arithmetic_t get_arithmetic(void) { return 0; }
static inline void set_arithmetic(arithmetic_t to) { (void)to; }
#endif

typedef struct {
    loopos_task task;
    void *context;
    long count;
    int threads;
    size_t scratch_bytes;
    arithmetic_t arithmetic; /* a result must not depend on who computes it */
} job_t;

static struct {
    pthread_mutex_t busy;  /* held by the caller whose job it is */
    pthread_mutex_t sleep; /* of `wake` and `sleepers` */
    pthread_cond_t wake;
    int workers; /* started in this process; changed by who holds `busy` */
    pthread_t worker[MAX_THREADS];
    int avoided; /* the processor that workers keep off; -1: none */
    int sleepers;
    job_t job;
    atomic_uint generation; /* odd: a job may be joined */
    atomic_int joined;      /* workers inside the job */
    atomic_int seats;       /* workers that may still join */
    struct {
        _Alignas(64) atomic_long task; /* each in a line of its own */
    } next[MAX_THREADS];               /* to be taken next, of each seat */
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .sleep = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .avoided = -1};

static _Thread_local int inside;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;

typedef struct {
    size_t bytes;
    void *memory;
} scratch_t;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void free_scratch(void *held) {
    scratch_t *scratch = held;
    free(scratch->memory);
    free(scratch);
}

static void after_fork(void) {
    /* The child has one thread and may have caught the parent in the middle of anything. */
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = pool.sleepers = 0;
    pool.avoided = -1;
    atomic_store(&pool.generation, 0);
    atomic_store(&pool.joined, 0);
    atomic_store(&pool.seats, 0);
}

static void initialise(void) {
    pthread_key_create(&scratch_key, free_scratch);
    pthread_atfork(NULL, NULL, after_fork);
}

/* This thread's scratch of at least so many bytes; NULL when there is no memory. */
static void *scratch_of_thread(size_t bytes) {
    scratch_t *scratch = pthread_getspecific(scratch_key);
    if (scratch == NULL) {
        scratch = calloc(1, sizeof *scratch);
        if (scratch == NULL || pthread_setspecific(scratch_key, scratch)) {
            free(scratch);
            return NULL;
        }
    }
    if (scratch->bytes < bytes) {
        void *memory = NULL;
        if (posix_memalign(&memory, 64, bytes)) return NULL;
        free(scratch->memory);
        scratch->memory = memory;
        scratch->bytes = bytes;
    }
    return scratch->memory;
}

static inline void begin_scratch(void *scratch, size_t bytes) {
    if (bytes >= sizeof(long)) *(long *)scratch = 0;
}

/* Where the tasks of a seat begin. */
static inline long seat_start(const job_t *job, long seat) { return job->count * seat / job->threads; }

/* First the tasks of a seat, then what is left of those of others. A thread gets the same tasks, side by
   side, when a job is repeated: what they read and write may still be in its cache. */
static void take_tasks(const job_t *job, int seat, void *scratch) {
    inside = 1;
    begin_scratch(scratch, job->scratch_bytes);
    for (int i = 0; i < job->threads; i++) {
        long from = (seat + i) % job->threads, end = seat_start(job, from + 1), index;
        atomic_long *next = &pool.next[from].task;
        while (atomic_load(next) < end && (index = atomic_fetch_add(next, 1)) < end)
            job->task(job->context, index, scratch);
    }
    inside = 0;
}

/* Take part in the job of this generation, if there is still a seat. */
static void join(unsigned generation, int worker) {
    atomic_fetch_add(&pool.joined, 1);
    /* The caller closes the job first and then waits for `joined` to fall to 0. */
    if (atomic_load(&pool.generation) == generation && atomic_fetch_sub(&pool.seats, 1) > 0) {
        void *scratch = pool.job.scratch_bytes ? scratch_of_thread(pool.job.scratch_bytes) : NULL;
        set_arithmetic(pool.job.arithmetic);
        if (scratch != NULL || pool.job.scratch_bytes == 0)
            take_tasks(&pool.job, worker % pool.job.threads, scratch);
    }
    atomic_fetch_sub(&pool.joined, 1);
}

static void *work(void *number) {
    unsigned seen = 0;
    for (;;) {
        long long end = now_ns() + SPIN_NS;
        unsigned generation;
        int turns = 0;
        while (generation = atomic_load_explicit(&pool.generation, memory_order_acquire),
               generation == seen || generation % 2 == 0) {
            relax();
            if (++turns % 64 || now_ns() < end) continue;
            pthread_mutex_lock(&pool.sleep);
            pool.sleepers++;
            while (generation = atomic_load(&pool.generation),
                   generation == seen || generation % 2 == 0)
                pthread_cond_wait(&pool.wake, &pool.sleep);
            pool.sleepers--;
            pthread_mutex_unlock(&pool.sleep);
            break;
        }
        seen = generation;
        join(generation, (int)(intptr_t)number);
    }
    return NULL;
}

/* Start workers up to this number; called with `busy` held. */
static void hire(int workers) {
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pool.workers >= workers) return;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* signals are for the host's own threads */
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (pool.workers < workers) {
        pthread_t thread;
        void *number = (void *)(intptr_t)(pool.workers + 1); /* 0 is the caller */
        if (pthread_create(&thread, &attributes, work, number)) break; /* fewer then */
        pool.worker[pool.workers++] = thread;
        pool.avoided = -1;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Keep workers off the processor of the caller. Where other threads of the host spin, none is idle to
   the system, and a worker that is woken would wait on this one until the work is done. */
static void make_way(void) {
#ifdef __linux__
    cpu_set_t others;
    int processor = sched_getcpu();
    if (processor < 0 || processor == pool.avoided) return;
    if (sched_getaffinity(0, sizeof others, &others)) return;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) == 0) return;
    pool.avoided = processor;
    for (int i = 0; i < pool.workers; i++)
        pthread_setaffinity_np(pool.worker[i], sizeof others, &others);
#endif
}

static int run_alone(long count, size_t scratch_bytes, loopos_task task, void *context) {
    void *scratch = NULL;
    int nested = inside;
    if (scratch_bytes) {
        /* A task that itself starts a job still holds this thread's scratch. */
        scratch = nested ? loopos_take(scratch_bytes) : scratch_of_thread(scratch_bytes);
        if (scratch == NULL) return -1;
    }
    inside = 1;
    begin_scratch(scratch, scratch_bytes);
    for (long index = 0; index < count; index++) task(context, index, scratch);
    inside = nested;
    if (nested && scratch != NULL) loopos_give(scratch);
    return 0;
}

int loopos_parallel(int threads, long count, size_t scratch_bytes, loopos_task task, void *context) {
    pthread_once(&once, initialise);
    if (count <= 0) return 0;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > count) threads = (int)count;
    if (threads < 2 || inside || pthread_mutex_trylock(&pool.busy))
        return run_alone(count, scratch_bytes, task, context);
    void *scratch = scratch_bytes ? scratch_of_thread(scratch_bytes) : NULL;
    if (scratch_bytes && scratch == NULL) {
        pthread_mutex_unlock(&pool.busy);
        return -1;
    }
    hire(threads - 1);
    make_way();
    pool.job = (job_t){task, context, count, threads, scratch_bytes, get_arithmetic()};
    for (int i = 0; i < threads; i++) atomic_store(&pool.next[i].task, seat_start(&pool.job, i));
    atomic_store(&pool.seats, threads - 1);
    atomic_fetch_add(&pool.generation, 1); /* open */
    pthread_mutex_lock(&pool.sleep);
    for (int i = 0; i < pool.sleepers && i < threads - 1; i++) pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
    take_tasks(&pool.job, 0, scratch);
    atomic_fetch_add(&pool.generation, 1); /* closed */
    /* A worker may have lost its processor to somebody else: do not keep this one from it. */
    for (unsigned turns = 1; atomic_load(&pool.joined); turns++)
        if (turns % TURNS) relax();
        else sched_yield();
    pthread_mutex_unlock(&pool.busy);
    return 0;
}

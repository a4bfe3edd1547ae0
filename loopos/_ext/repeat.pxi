# A computation that is repeated: what its kernels are given is written down, and given again.

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.pythread cimport PyThread_get_thread_ident
from libc.string cimport memset

# Recordings that differ before it is taken for granted that all will.
cdef enum:
    RECORDINGS = 4

# The kernels that may be repeated: they read and write what their struct points to, and nothing else.
cdef enum:
    PRODUCT, DECODE_PRODUCTS, PACKED_PRODUCT, ATTENTION_CACHED, ROPE, MAP, NORM, ROWS

ctypedef struct call_head:
    long kernel, threads, count, bytes

# The recording that is made; there is one at a time.
cdef Repeater recorder = None


def stop_recording():
    """Forget the recording of another thread, which a forked child does not have."""
    global recorder
    recorder = None


os.register_at_fork(after_in_child=stop_recording)


cdef int call_kernel(int kernel, int threads, long count, const void *p) noexcept nogil:
    cdef const loopos_table *table = loopos_kernels()
    if kernel == PRODUCT:
        return table.product(threads, <const loopos_product *>p)
    if kernel == DECODE_PRODUCTS:
        return table.decode_products(threads, count, <const loopos_product *>p)
    if kernel == PACKED_PRODUCT:
        return table.packed_product(threads, <const loopos_packed *>p)
    if kernel == ATTENTION_CACHED:
        return table.attention_cached(threads, <const loopos_cached *>p)
    if kernel == ROPE:
        return table.rope(threads, <const loopos_rope *>p)
    if kernel == MAP:
        return table.map(threads, <const loopos_map *>p)
    if kernel == NORM:
        return table.norm(threads, <const loopos_norm *>p)
    return table.rows(threads, <const loopos_rows *>p)


cdef run(int kernel, int threads, void *p, long bytes, long count=1):
    """Call a kernel with `count` structs, `bytes` in all, and write that down where it is recorded.

    The structs were cleared before they were filled in: two recordings are compared byte by byte.
    """
    cdef int status
    with nogil:
        status = call_kernel(kernel, threads, count, p)
    if status:
        no_scratch()
    if is_recorded():
        recorder.note(kernel, threads, p, bytes, count)


cdef bint is_recorded():
    """Whether this thread is the one that is recorded."""
    return recorder is not None and recorder.thread == PyThread_get_thread_ident()


cdef not_repeated():
    """Say of what happens now that kernels alone would not repeat it."""
    if is_recorded():
        recorder.whole = False
        recorder.notes, recorder.arrays = [], []


@cython.no_gc
cdef class Pool:
    """Memory for the arrays of a recording: given in the same order, it lies at the same addresses."""

    cdef list addresses, sizes, free

    def __cinit__(self):
        self.addresses, self.sizes, self.free = [], [], []

    def __dealloc__(self):
        for address in self.addresses:
            loopos_give(<void *><size_t>address)

    cdef long take(self, size_t bytes) except -1:
        """Return the number of a block: the first free one of this size, or else a new one."""
        cdef long i
        for i in range(len(self.free)):
            if self.free[i] and self.sizes[i] == bytes:
                self.free[i] = False
                return i
        cdef void *memory = loopos_take(bytes)
        if memory is NULL:
            raise MemoryError(f"no memory for {bytes} bytes")
        self.addresses.append(<size_t>memory)
        self.sizes.append(bytes)
        self.free.append(False)
        return len(self.free) - 1

    cdef long in_use(self):
        return sum(not free for free in self.free)

    cdef bint holds(self, const void *data):
        cdef size_t at = <size_t>data, begin, bytes
        for begin, bytes in zip(self.addresses, self.sizes):
            if begin <= at < begin + bytes:
                return True
        return False


cdef class Repeater:
    """Computes something again and again; as soon as it can, by its kernels alone.

    Two recordings that are the same to the byte say that nothing but the contents of arrays differs
    from one time to the next. From then on the kernels are called with what they were given, without
    Python in between. An array that was made outside of the kernels on the way has another address the
    second time, for the first is kept until then, and so has what was made of it.

    Attributes
    ----------
    settled : bool
        Whether what was recorded is repeated.
    """

    cdef readonly bint settled
    cdef bint busy
    cdef int recordings
    cdef Pool pool
    cdef unsigned long thread
    cdef bint whole          # nothing ran that may not be repeated
    cdef list notes, arrays  # of this recording: the calls, and what they were given from outside
    cdef list held           # those arrays of the one before: they must not die, nor change places
    cdef bytes calls         # of the one before
    cdef object place        # of its result
    cdef object result

    def __cinit__(self):
        self.pool, self.calls, self.held = Pool(), b"", []

    def __call__(self, compute):
        """Return ``compute()``, an array that may be overwritten by the next call."""
        global recorder
        if self.busy or (not self.settled and (recorder is not None or self.recordings == RECORDINGS)):
            return compute()
        if self.settled:
            self.repeat()
            return self.result
        self.notes, self.arrays, self.whole = [], [], True
        self.thread = PyThread_get_thread_ident()
        recorder = self
        try:
            result = compute()
            self.compare(result)
        finally:
            recorder = None
            self.notes = self.arrays = None
        return result

    cdef compare(self, result):
        """Look whether this recording is the one before."""
        cdef bint whole = (
            self.whole
            and isinstance(result, cnp.ndarray)
            and self.pool.holds(cnp.PyArray_DATA(<cnp.ndarray>result))
            and self.pool.in_use() == 1  # the result: another one would be overwritten
        )
        calls, place = b"".join(self.notes), None
        if whole:
            place = (<size_t>cnp.PyArray_DATA(<cnp.ndarray>result), result.shape, result.strides)
        self.recordings += 1
        self.settled = whole and calls == self.calls and place == self.place
        if not whole or (not self.settled and self.recordings == RECORDINGS):
            calls, self.arrays = b"", []
        self.calls, self.place, self.held = calls, place, self.arrays
        if self.settled:
            self.result = result

    cdef note(self, int kernel, int threads, void *p, long bytes, long count):
        cdef call_head head
        if self.whole:
            head.kernel, head.threads, head.count, head.bytes = kernel, threads, count, bytes
            self.notes.append((<char *>&head)[:sizeof(head)])
            self.notes.append((<char *>p)[:bytes])

    cdef hold(self, array):
        if self.whole and not self.pool.holds(cnp.PyArray_DATA(<cnp.ndarray>array)):
            self.arrays.append(array)

    cdef repeat(self):
        cdef const char *at = PyBytes_AS_STRING(self.calls)
        cdef const char *end = at + len(self.calls)
        cdef const call_head *head
        cdef int status = 0
        self.busy = True  # without the interpreter's lock another thread might come
        with nogil:
            while at < end and not status:
                head = <const call_head *>at
                status = call_kernel(head.kernel, head.threads, head.count, at + sizeof(call_head))
                at += sizeof(call_head) + head.bytes
        self.busy = False
        if status:
            no_scratch()

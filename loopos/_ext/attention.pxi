# Attention and rotary positions.


cdef float *tokens(object array, str name, long n, long heads, long d) except? NULL:
    """The data of a float32 array [n, heads, d] (-1: any)."""
    cdef float *data = floats(array, name)
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(<cnp.ndarray>array)
    if (
        cnp.PyArray_NDIM(<cnp.ndarray>array) != 3
        or (n >= 0 and shape[0] != n)
        or (heads >= 0 and shape[1] != heads)
        or (d >= 0 and shape[2] != d)
    ):
        sizes = ", ".join("any" if size < 0 else str(size) for size in (n, heads, d))
        wrong_shape(array, name, f"[{sizes}]")
    return data


cdef cnp.ndarray make3(long n, long heads, long d):
    cdef cnp.npy_intp[3] shape
    shape[0], shape[1], shape[2] = n, heads, d
    return make(3, shape)


cdef const int32_t *offsets_of(object offsets, long n) except NULL:
    """Offsets that rise from 0 to n."""
    cdef int32_t *data = integers(offsets, "offsets", -1)
    cdef long count = size_of(offsets, 0), i
    if count == 0 or data[0] != 0 or data[count - 1] != n:
        raise ValueError(f"offsets: expected to begin with 0 and end with {n}")
    for i in range(1, count):
        if data[i] < data[i - 1]:
            raise ValueError(f"offsets: fall from {data[i - 1]} to {data[i]} at index {i}")
    return data


cdef long window_of(object window):
    """The window, 0 for none; the backend has checked it."""
    return 0 if window is None else min(int(window), 2**30)


cdef check_groups(long heads, long kv_heads):
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads do not divide the {heads} heads of q")


cdef attention_arguments(
    loopos_attention *p, q, k, v, offsets, bint causal, scale, window, rate, key, samples
):
    """Check and fill in what forward and backward have in common."""
    p.q = tokens(q, "q", -1, -1, -1)
    p.n, p.heads, p.d = size_of(q, 0), size_of(q, 1), size_of(q, 2)
    p.k = tokens(k, "k", p.n, -1, p.d)
    p.kv_heads = size_of(k, 1)
    check_groups(p.heads, p.kv_heads)
    p.v = tokens(v, "v", p.n, p.kv_heads, p.d)
    p.offsets = offsets_of(offsets, p.n)
    p.sequences = size_of(offsets, 0) - 1
    p.causal, p.scale, p.window = causal, scale, window_of(window)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate: expected at least 0 and less than 1, found {rate}")
    p.threshold = <uint64_t>round(rate * 2**32)
    p.kept = 1.0 / (1.0 - rate)
    p.key = <uint64_t>(int(key) & 0xFFFFFFFFFFFFFFFF)
    p.samples = NULL
    if samples is not None:
        check(samples, "sample_ids", cnp.NPY_INT64, "int64", False)
        if cnp.PyArray_NDIM(<cnp.ndarray>samples) != 1 or size_of(samples, 0) != p.sequences:
            wrong_shape(samples, "sample_ids", f"[{p.sequences}]")
        p.samples = <int64_t *>cnp.PyArray_DATA(<cnp.ndarray>samples)


def attention(q, k, v, offsets, causal, scale, window, rate, key, samples, int threads):
    """Return the attention of each sequence on itself, and the log-sum-exp of its scores."""
    cdef loopos_attention p
    cdef int status
    attention_arguments(&p, q, k, v, offsets, causal, scale, window, rate, key, samples)
    y, lse = make3(p.n, p.heads, p.d), make2(p.n, p.heads)
    p.y, p.lse = <float *>cnp.PyArray_DATA(y), <float *>cnp.PyArray_DATA(lse)
    with nogil:
        status = loopos_kernels().attention(threads, &p)
    done(status)
    return y, lse


def attention_backward(
    dy, q, k, v, y, lse, offsets, causal, scale, window, rate, key, samples, int threads
):
    """Return the gradients of q, k and v."""
    cdef loopos_attention p
    cdef int status
    attention_arguments(&p, q, k, v, offsets, causal, scale, window, rate, key, samples)
    p.dy = tokens(dy, "dy", p.n, p.heads, p.d)
    p.y = tokens(y, "y", p.n, p.heads, p.d)
    p.lse = matrix(lse, "lse", p.n, p.heads)
    dq, dk, dv = make_like(q), make_like(k), make_like(v)
    p.dq, p.dk = <float *>cnp.PyArray_DATA(dq), <float *>cnp.PyArray_DATA(dk)
    p.dv = <float *>cnp.PyArray_DATA(dv)
    with nogil:
        status = loopos_kernels().attention_backward(threads, &p)
    done(status)
    return dq, dk, dv


cdef float *cache(
    object array, str name, long slots, long capacity, long heads, long d
) except? NULL:
    """The data of a float32 array [slots, capacity, heads, d] (-1: any), to be written to."""
    cdef float *data = floats(array, name, True)
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(<cnp.ndarray>array)
    if (
        cnp.PyArray_NDIM(<cnp.ndarray>array) != 4
        or (slots >= 0 and shape[0] != slots)
        or (capacity >= 0 and shape[1] != capacity)
        or (heads >= 0 and shape[2] != heads)
        or shape[3] != d
    ):
        sizes = ", ".join("any" if n < 0 else str(n) for n in (slots, capacity, heads, d))
        wrong_shape(array, name, f"[{sizes}]")
    return data


def attention_cached(
    q, k, v, k_cache, v_cache, offsets, slots, lengths, scale, window, int threads
):
    """Write the keys and values of new tokens to a cache, and return their attention on it."""
    cdef loopos_cached p
    cdef long b, count, slot_count
    memset(&p, 0, sizeof(p))
    p.q = tokens(q, "q", -1, -1, -1)
    p.n, p.heads, p.d = size_of(q, 0), size_of(q, 1), size_of(q, 2)
    p.k = tokens(k, "k", p.n, -1, p.d)
    p.kv_heads = size_of(k, 1)
    check_groups(p.heads, p.kv_heads)
    p.v = tokens(v, "v", p.n, p.kv_heads, p.d)
    p.k_cache = cache(k_cache, "k_cache", -1, -1, p.kv_heads, p.d)
    slot_count, p.capacity = size_of(k_cache, 0), size_of(k_cache, 1)
    p.v_cache = cache(v_cache, "v_cache", slot_count, p.capacity, p.kv_heads, p.d)
    p.offsets = offsets_of(offsets, p.n)
    p.sequences = size_of(offsets, 0) - 1
    p.slots = integers(slots, "slots", p.sequences)
    p.lengths = integers(lengths, "lengths", p.sequences)
    for b in range(p.sequences):
        count = p.offsets[b + 1] - p.offsets[b]
        if not 0 <= p.slots[b] < slot_count:
            raise ValueError(f"slots: {p.slots[b]} at index {b}, the cache has {slot_count} slots")
        if not count <= p.lengths[b] <= p.capacity:
            raise ValueError(
                f"lengths: {p.lengths[b]} at index {b}, expected from {count} (the new tokens) "
                f"to {p.capacity} (the capacity)"
            )
    p.scale, p.window = scale, window_of(window)
    y = make_like(q)
    p.y = <float *>cnp.PyArray_DATA(y)
    run(ATTENTION_CACHED, threads, &p, sizeof(p))
    return y


def rope(q, k, positions, inv_freq, bint inverse, int threads):
    """Return q and k rotated by their positions, or back."""
    cdef loopos_rope p
    memset(&p, 0, sizeof(p))
    p.q = tokens(q, "q", -1, -1, -1)
    p.n, p.heads, p.d = size_of(q, 0), size_of(q, 1), size_of(q, 2)
    p.k = tokens(k, "k", p.n, -1, p.d)
    p.kv_heads = size_of(k, 1)
    p.positions = integers(positions, "positions", p.n)
    check(inv_freq, "inv_freq", cnp.NPY_FLOAT64, "float64", False)
    if cnp.PyArray_NDIM(<cnp.ndarray>inv_freq) != 1 or 2 * size_of(inv_freq, 0) > p.d:
        wrong_shape(inv_freq, "inv_freq", f"[at most {p.d // 2}]")
    p.half = size_of(inv_freq, 0)
    p.inv_freq = <double *>cnp.PyArray_DATA(<cnp.ndarray>inv_freq)
    p.inverse = inverse
    q_out, k_out = make_like(q), make_like(k)
    p.q_out, p.k_out = <float *>cnp.PyArray_DATA(q_out), <float *>cnp.PyArray_DATA(k_out)
    run(ROPE, threads, &p, sizeof(p))
    return q_out, k_out

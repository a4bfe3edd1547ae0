# Weights of 16 or 8 bits in panels of 32 outputs.

cdef enum:
    PANEL = 32
    LINES_TOGETHER = 16


cdef check_panels(object panels, long n, long k):
    """The bits of a weight; panels of another dtype are a TypeError, of another shape a ValueError."""
    if not isinstance(panels, cnp.ndarray):
        raise TypeError(f"panels: expected a NumPy array, found {type(panels).__name__}")
    cdef int kind = cnp.PyArray_TYPE(<cnp.ndarray>panels)
    if kind not in (cnp.NPY_UINT16, cnp.NPY_INT8):
        raise TypeError(f"panels: expected an array of uint16 or int8, found {panels.dtype}")
    check(panels, "panels", kind, "uint16" if kind == cnp.NPY_UINT16 else "int8", False)
    cdef int bits = 16 if kind == cnp.NPY_UINT16 else 8
    expected = panels_shape(n, k, bits)
    if panels.shape != expected:
        wrong_shape(panels, "panels", str(list(expected)))
    return bits


cdef tuple panels_shape(long n, long k, int bits):
    cdef long per_line = 32 // bits
    cdef long deep = per_line * LINES_TOGETHER
    return ((n + PANEL - 1) // PANEL, (k + deep - 1) // deep * LINES_TOGETHER, PANEL, per_line)


def pack_weight(w, int bits, int threads):
    """Return the panels of ``w[O, C]`` and, for 8 bits, the scale of each output (else None)."""
    cdef loopos_pack p
    cdef int status
    if bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16, found {bits}")
    p.w = matrix(w, "w", -1, -1)
    p.n, p.k, p.bits = size_of(w, 0), size_of(w, 1), bits
    shape = panels_shape(p.n, p.k, bits)
    # As many floats as hold that many bytes: memory of the arena lies at cache lines.
    memory = empty(shape[0] * shape[1] * PANEL)
    panels = memory.view(np.int8 if bits == 8 else np.uint16).reshape(shape)
    scales = empty(p.n) if bits == 8 else None
    p.panels = cnp.PyArray_DATA(<cnp.ndarray>panels)
    p.scales = vector_or_null(scales, "scales", p.n)
    with nogil:
        status = loopos_kernels().pack_weight(threads, &p)
    done(status)
    return panels, scales


def linear_packed(x, panels, long outputs, long inputs, scales, b, activation, int threads):
    """Return ``act(x w^T + b)`` for a weight of so many outputs and inputs in panels."""
    cdef loopos_packed p
    memset(&p, 0, sizeof(p))
    p.x = matrix(x, "x", -1, inputs)
    p.m, p.n, p.k = size_of(x, 0), outputs, inputs
    p.bits = check_panels(panels, p.n, p.k)
    p.panels = cnp.PyArray_DATA(<cnp.ndarray>panels)
    p.scales = vector_or_null(scales, "scales", p.n)
    p.bias = vector_or_null(b, "b", p.n)
    p.activation = ACTIVATION_CODES[activation]
    y = make2(p.m, p.n)
    p.y = <float *>cnp.PyArray_DATA(y)
    run(PACKED_PRODUCT, threads, &p, sizeof(p))
    return y

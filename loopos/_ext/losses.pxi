# Losses over the vocabulary: rows of logits, in place.


cdef targets_of(loopos_loss_rows *p, z, targets):
    """Set the logits and targets; a target outside of the columns is an IndexError."""
    cdef long row
    p.z = matrix(z, "z", -1, -1, True)
    p.rows, p.columns = size_of(z, 0), size_of(z, 1)
    p.targets = integers(targets, "targets", p.rows)
    for row in range(p.rows):
        if not 0 <= p.targets[row] < p.columns:
            raise IndexError(f"targets: {p.targets[row]} is outside of {p.columns} columns")


def loss_rows(z, targets, float factor, bint need_entropy, int threads, dlogp=None):
    """Return (logp of the targets, lse, entropy or None) of each row of ``factor * z``.

    Given `dlogp`, and where no entropy is wanted, `z` is replaced by the gradient of ``dlogp * logp``.
    """
    cdef loopos_loss_rows p
    cdef int status
    cdef cnp.npy_intp[1] shape
    targets_of(&p, z, targets)
    shape[0] = p.rows
    logp, lse = make(1, shape), make(1, shape)
    entropy = make(1, shape) if need_entropy else None
    p.factor, p.logp, p.lse = factor, floats(logp, "logp"), floats(lse, "lse")
    p.entropy = floats(entropy, "entropy") if need_entropy else NULL
    p.dlogp, p.dentropy = vector_or_null(dlogp, "dlogp", p.rows), NULL
    if need_entropy and dlogp is not None:
        raise ValueError("dlogp: expected None where the entropy is wanted")
    with nogil:
        status = loopos_kernels().loss_rows(threads, &p)
    done(status)
    return logp, lse, entropy


def loss_rows_gradient(z, targets, float factor, dlogp, lse, dentropy, entropy, int threads):
    """Replace `z` by the gradient of ``dlogp * logp + dentropy * entropy`` in it."""
    cdef loopos_loss_rows p
    cdef int status
    targets_of(&p, z, targets)
    p.factor, p.logp = factor, NULL
    p.dlogp, p.lse = vector(dlogp, "dlogp", p.rows), vector(lse, "lse", p.rows)
    p.dentropy = vector_or_null(dentropy, "dentropy", p.rows)
    p.entropy = NULL if dentropy is None else vector(entropy, "entropy", p.rows)
    with nogil:
        status = loopos_kernels().loss_rows_gradient(threads, &p)
    done(status)


def kl_rows(z, z_ref, float factor, int threads):
    """Return the divergence of each row of ``factor * z`` from that of ``factor * z_ref``."""
    cdef loopos_kl_rows p
    cdef int status
    cdef cnp.npy_intp[1] shape
    p.z = matrix(z, "z", -1, -1)
    p.rows, p.columns, p.factor = size_of(z, 0), size_of(z, 1), factor
    p.z_ref = matrix(z_ref, "z_ref", p.rows, p.columns)
    shape[0] = p.rows
    kl = make(1, shape)
    p.kl, p.dkl = floats(kl, "kl"), NULL
    with nogil:
        status = loopos_kernels().kl_rows(threads, &p)
    done(status)
    return kl


def kl_rows_gradient(z, z_ref, float factor, dkl, kl, int threads):
    """Replace `z` by the gradient of ``dkl * kl`` in it."""
    cdef loopos_kl_rows p
    cdef int status
    p.z = matrix(z, "z", -1, -1, True)
    p.rows, p.columns, p.factor = size_of(z, 0), size_of(z, 1), factor
    p.z_ref = matrix(z_ref, "z_ref", p.rows, p.columns)
    p.dkl, p.kl = vector(dkl, "dkl", p.rows), vector(kl, "kl", p.rows)
    with nogil:
        status = loopos_kernels().kl_rows_gradient(threads, &p)
    done(status)


def sample(z, double temperature, long top_k, double top_p, double min_p, u, int threads):
    """Return (ids, logp) of one token drawn from each row of logits."""
    cdef loopos_sample p
    cdef int status
    p.z = matrix(z, "z", -1, -1)
    p.rows, p.columns = size_of(z, 0), size_of(z, 1)
    if p.columns == 0:
        raise ValueError(f"z: expected shape [any, at least 1], found {list(z.shape)}")
    check(u, "u", cnp.NPY_FLOAT64, "float64", False)
    if cnp.PyArray_NDIM(<cnp.ndarray>u) != 1 or size_of(u, 0) != p.rows:
        wrong_shape(u, "u", f"[{p.rows}]")
    ids, logp = np.empty(p.rows, np.int32), np.empty(p.rows, np.float32)
    p.temperature, p.top_k, p.top_p, p.min_p = temperature, top_k, top_p, min_p
    p.u, p.ids = <double *>cnp.PyArray_DATA(<cnp.ndarray>u), <int32_t *>cnp.PyArray_DATA(ids)
    p.logp = vector(logp, "logp", p.rows)
    with nogil:
        status = loopos_kernels().sample(threads, &p)
    done(status)
    return ids, logp

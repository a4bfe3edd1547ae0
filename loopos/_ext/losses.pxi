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


def loss_rows(z, targets, float factor, bint need_entropy, int threads):
    """Return (logp of the targets, lse, entropy or None) of each row of ``factor * z``."""
    cdef loopos_loss_rows p
    cdef int status
    cdef cnp.npy_intp[1] shape
    targets_of(&p, z, targets)
    shape[0] = p.rows
    logp, lse = make(1, shape), make(1, shape)
    entropy = make(1, shape) if need_entropy else None
    p.factor, p.logp, p.lse = factor, floats(logp, "logp"), floats(lse, "lse")
    p.entropy = floats(entropy, "entropy") if need_entropy else NULL
    p.dlogp = p.dentropy = NULL
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
    p.dentropy, p.entropy = vector(dentropy, "dentropy", p.rows), vector(entropy, "entropy", p.rows)
    if p.dlogp is NULL or p.lse is NULL or (p.dentropy is not NULL and p.entropy is NULL):
        raise TypeError("dlogp and lse: expected arrays, and an entropy beside dentropy")
    with nogil:
        status = loopos_kernels().loss_rows_gradient(threads, &p)
    done(status)

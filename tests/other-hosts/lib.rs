//! Other hosts of the same layers: see `tests`.

//! Kernel loaders and firmware tables.

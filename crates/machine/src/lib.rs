//! A PC assembled from a description.

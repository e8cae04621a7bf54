//! Guest images: catalogue, cache, builders.

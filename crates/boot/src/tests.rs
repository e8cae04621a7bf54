//! Whole loads, from a kernel made here to guest memory.

mod arbitrary;
mod elf_kernels;
mod images;
mod linux_images;
mod refusals;

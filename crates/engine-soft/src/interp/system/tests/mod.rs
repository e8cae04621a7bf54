//! Tests by raw machine code.

mod control;
mod debugging;
mod events;
mod far;
mod flags;
mod fuzz;
mod io;
mod iret;
mod kvm;
mod msrs;
mod segments;
mod state;
mod syscalls;
mod tasks;
mod translations;

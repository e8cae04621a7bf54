//! Lock-step itself: what goes over each channel reaches the other machine, and what a wrong translator does is told.

mod bugs;
mod channels;
mod lab;

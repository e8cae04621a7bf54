//! Every form that thunks execute, against the same instruction run natively.

mod exceptions;
mod forms;
mod generate;
mod machine;
mod native;
mod states;

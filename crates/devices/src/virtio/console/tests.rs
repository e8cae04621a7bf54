//! The console as a driver sees it, and as a hostile one does.

mod hostile;
mod life;

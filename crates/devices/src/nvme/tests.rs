mod admin;
mod driver;
mod hostile;
mod io;
mod life;

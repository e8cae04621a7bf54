mod all;
mod driver;
mod hostile;
mod life;

mod driver;
mod hostile;
mod life;

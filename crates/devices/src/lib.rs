//! Buses and the platform devices of the PC.

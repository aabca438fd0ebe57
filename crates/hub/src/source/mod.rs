//! One file per kind of source. Each takes what a card (or the user) says, brings the file to its final place and
//! returns its path; none of them knows that others exist.

pub mod hub;
pub mod path;
pub mod wheel;

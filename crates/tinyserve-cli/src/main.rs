//! The `tinyserve` command.
fn main() {}

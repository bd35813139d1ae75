//! `kachefs-rustc`: what cargo runs as `RUSTC_WRAPPER`. See [`wrapper::client`].

fn main() -> std::process::ExitCode {
    wrapper::client::main()
}

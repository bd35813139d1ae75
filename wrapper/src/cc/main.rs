//! `kachefs-cc`: what stands before a C or C++ compiler. See [`wrapper::cc`].

fn main() -> std::process::ExitCode {
    wrapper::cc::main()
}

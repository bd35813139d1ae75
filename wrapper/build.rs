//! Makes the shim (`shim/lib.rs`), which becomes part of the wrapper.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    for input in [
        "build.rs",
        "shim",
        "src/trace/loader.rs",
        "src/trace/ring.rs",
        "src/trace/words.rs",
    ] {
        println!("cargo::rerun-if-changed={input}");
    }
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let made = PathBuf::from(variable("OUT_DIR")?).join("shim.so");
    // Its calls are made in this machine's language, and of this system's C library.
    if variable("TARGET")? != "x86_64-unknown-linux-gnu" {
        return Ok(fs::write(made, "")?);
    }
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        .args(["--crate-name=kachefs_shim", "--crate-type=cdylib", "--edition=2024"])
        .args(["--target=x86_64-unknown-linux-gnu", "-Copt-level=3", "-Cpanic=abort"])
        .args(["-Clink-arg=-nostdlib", "-Clink-arg=-nostartfiles", "-Cstrip=symbols"])
        // What it is loaded into is not told where it was made.
        .arg(format!("--remap-path-prefix={}=kachefs", variable("CARGO_MANIFEST_DIR")?))
        .arg("shim/lib.rs")
        .arg("-o")
        .arg(made);
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let status = rustc.status()?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| format!("the shim: {status}").into())
}

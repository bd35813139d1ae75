//! A proxy in front of an S3 server that adds a delay to every request, and counts.
//!
//! `late_proxy http://HOST:PORT MILLISECONDS` prints where it listens. Each line on its standard input is
//! answered with what went through until then, as one line of JSON; it ends with that input. Run by
//! `scripts/bench-remote`.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::time::Duration;

use harness::Proxy;
use harness::proxy::Fault;

fn from_arguments() -> Option<(String, Fault)> {
    let mut words = std::env::args().skip(1);
    let server = words.next()?;
    let fault = match words.next()?.parse().ok()? {
        0 => Fault::None,
        delay => Fault::Late(Duration::from_millis(delay)),
    };
    Some((server, fault))
}

fn serve(server: &str, fault: Fault) -> io::Result<()> {
    let proxy = Proxy::start(server, move |_| fault);
    let mut output = io::stdout().lock();
    writeln!(output, "{}", proxy.endpoint())?;
    output.flush()?;
    for line in io::stdin().lock().lines() {
        line?;
        let counts = serde_json::json!({
            "requests": proxy.requests(),
            "bytes_sent": proxy.bytes_sent(),
            "bytes_received": proxy.bytes_received(),
        });
        writeln!(output, "{counts}")?;
        output.flush()?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let Some((server, fault)) = from_arguments() else {
        eprintln!("usage: late_proxy http://HOST:PORT MILLISECONDS");
        return ExitCode::from(2);
    };
    match serve(&server, fault) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("late_proxy: {error}");
            ExitCode::FAILURE
        }
    }
}

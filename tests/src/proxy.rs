//! A proxy between a machine and a real S3 server, for what no real server can be told to do: be slow,
//! be overloaded, break off, cut short, flip a bit, say nothing, live in another time.
//!
//! It understands as much of HTTP/1.1 (RFC 9112) as clients of S3 speak: one request at a time on a
//! connection, bodies with a length. Each request gets a connection of its own to the server.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::Must;

/// Longer than any client waits.
const HANG: Duration = Duration::from_mins(2);

/// What is done to the answer of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It comes later.
    Late(Duration),
    /// It comes slowly: so many bytes a second.
    Slow(u64),
    /// The server has too much to do (S3 API reference, "Error responses": `SlowDown`).
    Overloaded,
    /// The connection is reset in the middle of the body.
    Reset,
    /// The body ends early, although the connection ends in order.
    Truncated,
    /// One bit of the body is another.
    Flipped,
    /// Nothing comes, for as long as anybody waits.
    Hung,
    /// The server says that the clocks differ too much.
    Skewed,
    /// The server says that this may not be read.
    Forbidden,
}

/// A request as the proxy sees it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// `GET`, `PUT`, …
    pub method: String,
    /// What is asked for.
    pub target: String,
    /// Which bytes of it (RFC 9110, section 14.2); empty for all.
    pub range: String,
    /// How many requests came before.
    pub number: u64,
}

type Choose = dyn Fn(&Asked) -> Fault + Send + Sync;

/// A running proxy; it ends when dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    server: SocketAddr,
    choose: Box<Choose>,
    ended: AtomicBool,
    requests: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Proxy {
    /// A proxy in front of `server`, `http://HOST:PORT`, that does to each answer what `choose` says.
    pub fn start(server: &str, choose: impl Fn(&Asked) -> Fault + Send + Sync + 'static) -> Self {
        let server = server.trim_start_matches("http://");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).must("listen");
        let address = listener.local_addr().must("an address");
        let shared = Arc::new(Shared {
            server: server.parse().must(server),
            choose: Box::new(choose),
            ended: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if serving.ended.load(Ordering::Relaxed) {
                    break;
                }
                let serving = Arc::clone(&serving);
                // A client that goes away is what some faults are about.
                thread::spawn(move || client.and_then(|client| serving.serve(&client)));
            }
        });
        Self { address, shared }
    }

    /// Where it is.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Bytes of bodies that clients have been sent so far.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Bytes of bodies that came from clients so far.
    pub fn bytes_received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the loop, which then sees that it is over; it may have ended by itself.
        let _ = TcpStream::connect(self.address);
    }
}

/// The first lines of a message.
struct Head {
    first: String,
    fields: Vec<(String, String)>,
}

impl Head {
    fn read(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let line = line.trim_end();
            if line.is_empty() && !lines.is_empty() {
                break;
            }
            lines.push(line.to_owned());
        }
        let first = lines.remove(0);
        let fields = lines.iter().filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.trim().to_owned()))
        });
        Ok(Some(Self {
            first,
            fields: fields.collect(),
        }))
    }

    fn get(&self, name: &str) -> Option<&str> {
        let mut found = self
            .fields
            .iter()
            .filter(|(known, _)| known.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: &str, value: &str) {
        self.fields
            .retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self.fields.push((name.to_owned(), value.to_owned()));
    }

    /// What was agreed with the server says nothing of the client's connection.
    fn drop_connection(&mut self) {
        self.fields
            .retain(|(known, _)| !known.eq_ignore_ascii_case("connection"));
    }

    fn length(&self) -> Option<usize> {
        self.get("content-length")?.parse().ok()
    }

    fn write(&self, into: &mut impl Write) -> io::Result<()> {
        let mut text = format!("{}\r\n", self.first).into_bytes();
        for (name, value) in &self.fields {
            write!(text, "{name}: {value}\r\n")?;
        }
        text.extend(b"\r\n");
        into.write_all(&text)
    }
}

impl Shared {
    fn serve(&self, client: &TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut from = BufReader::new(client);
        while let Some(mut head) = Head::read(&mut from)? {
            if head.get("expect").is_some() {
                (&*client).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
                head.fields
                    .retain(|(name, _)| !name.eq_ignore_ascii_case("expect"));
            }
            let mut body = vec![0; head.length().unwrap_or(0)];
            from.read_exact(&mut body)?;
            self.received
                .fetch_add(body.len() as u64, Ordering::Relaxed);
            let mut words = head.first.split(' ').map(str::to_owned);
            let asked = Asked {
                method: words.next().unwrap_or_default(),
                target: words.next().unwrap_or_default(),
                range: head.get("range").unwrap_or_default().to_owned(),
                number: self.requests.fetch_add(1, Ordering::Relaxed),
            };
            let fault = (self.choose)(&asked);
            let answer = match fault {
                Fault::Hung => {
                    thread::sleep(HANG);
                    return Ok(());
                }
                Fault::Overloaded => error(503, "SlowDown"),
                Fault::Skewed => error(403, "RequestTimeTooSkewed"),
                Fault::Forbidden => error(403, "AccessDenied"),
                Fault::None | Fault::Late(_) if asked.method != "HEAD" => {
                    match self.pass_on(client, &head, &body, fault)? {
                        Some(answer) => answer,
                        None => continue,
                    }
                }
                _ => self.ask(&head, &body, asked.method == "HEAD")?,
            };
            self.answer(client, answer, fault)?;
            if matches!(fault, Fault::Reset | Fault::Truncated) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends the request, and reads the first lines of what the server says.
    fn send(&self, head: &Head, body: &[u8]) -> io::Result<(Head, BufReader<TcpStream>)> {
        let mut server = TcpStream::connect(self.server)?;
        server.set_nodelay(true)?;
        let mut asked = Head {
            first: head.first.clone(),
            fields: head.fields.clone(),
        };
        asked.set("Connection", "close");
        asked.write(&mut server)?;
        server.write_all(body)?;
        let mut from = BufReader::new(server);
        let answer = Head::read(&mut from)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((answer, from))
    }

    /// Passes a body on while it arrives, as no proxy that measures may hold it back; an answer whose
    /// length is not known beforehand is returned whole.
    fn pass_on(
        &self,
        mut client: &TcpStream,
        head: &Head,
        body: &[u8],
        fault: Fault,
    ) -> io::Result<Option<(Head, Vec<u8>)>> {
        let (mut answer, from) = self.send(head, body)?;
        let Some(length) = answer.length() else {
            return Self::whole(answer, from, false).map(Some);
        };
        if let Fault::Late(time) = fault {
            thread::sleep(time);
        }
        answer.drop_connection();
        answer.write(&mut client)?;
        self.sent.fetch_add(length as u64, Ordering::Relaxed);
        let copied = io::copy(&mut from.take(length as u64), &mut client)?;
        if copied == length as u64 {
            Ok(None)
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// What the server says.
    fn ask(&self, head: &Head, body: &[u8], no_body: bool) -> io::Result<(Head, Vec<u8>)> {
        let (answer, from) = self.send(head, body)?;
        Self::whole(answer, from, no_body)
    }

    /// An answer with all of its body.
    fn whole(
        mut answer: Head,
        mut from: impl BufRead,
        no_body: bool,
    ) -> io::Result<(Head, Vec<u8>)> {
        let mut body = Vec::new();
        if !no_body {
            match answer.length() {
                Some(length) => {
                    body.resize(length, 0);
                    from.read_exact(&mut body)?;
                }
                None if answer.get("transfer-encoding").is_some() => {
                    body = dechunked(&mut from)?;
                    answer
                        .fields
                        .retain(|(name, _)| !name.eq_ignore_ascii_case("transfer-encoding"));
                    answer.set("Content-Length", &body.len().to_string());
                }
                None => {
                    from.read_to_end(&mut body)?;
                    answer.set("Content-Length", &body.len().to_string());
                }
            }
        }
        answer.drop_connection();
        Ok((answer, body))
    }

    fn answer(
        &self,
        mut client: &TcpStream,
        (head, mut body): (Head, Vec<u8>),
        fault: Fault,
    ) -> io::Result<()> {
        match fault {
            Fault::Late(time) => thread::sleep(time),
            Fault::Flipped if !body.is_empty() => {
                let middle = body.len() / 2;
                body[middle] ^= 1;
            }
            _ => {}
        }
        head.write(&mut client)?;
        let sent = match fault {
            Fault::Reset | Fault::Truncated => &body[..body.len() / 2],
            _ => &body[..],
        };
        self.sent.fetch_add(sent.len() as u64, Ordering::Relaxed);
        match fault {
            Fault::Slow(rate) => {
                let piece = usize::try_from(rate / 20).unwrap_or(usize::MAX).max(1);
                for piece in sent.chunks(piece) {
                    client.write_all(piece)?;
                    thread::sleep(Duration::from_millis(50));
                }
            }
            _ => client.write_all(sent)?,
        }
        if fault == Fault::Reset {
            // Closed with nothing lingering, a connection is reset (socket(7), SO_LINGER).
            let linger = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &linger)?;
        }
        Ok(())
    }
}

fn error(status: u16, code: &str) -> (Head, Vec<u8>) {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code>\
         <Message>said the proxy</Message></Error>"
    );
    let fields = [
        ("Content-Type", "application/xml".to_owned()),
        ("Content-Length", body.len().to_string()),
    ];
    let head = Head {
        first: format!("HTTP/1.1 {status} {code}"),
        fields: fields
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec(),
    };
    (head, body.into_bytes())
}

fn dechunked(from: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        from.read_line(&mut line)?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
        let start = body.len();
        body.resize(start + size, 0);
        from.read_exact(&mut body[start..])?;
        from.read_line(&mut line)?;
        if size == 0 {
            return Ok(body);
        }
    }
}

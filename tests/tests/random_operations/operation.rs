//! The operations a sequence is made of, how they are chosen, and what can be seen of them.

use std::collections::BTreeMap;

use nix::errno::Errno;
use proptest::prelude::*;
use proptest::sample::select;

/// Names to choose from: few, so that operations meet.
pub const NAMES: [&str; 3] = ["a", "b", "c"];
/// What symbolic links point to: a name, a path, nothing, the directory itself.
const TARGETS: [&str; 4] = ["a", "b/c", "nowhere", "."];
/// Descriptors an operation can use.
pub const SLOTS: usize = 2;

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
pub struct Open(pub i32);

/// A path of up to three names.
pub type Place = Vec<usize>;

/// One system call, or the few that belong together.
#[derive(Clone, Debug)]
pub enum Op {
    Open(usize, Place, Open, u32),
    Close(usize),
    Write(usize, Piece),
    WriteAt(usize, u32, Piece),
    Read(usize, u32),
    ReadAt(usize, u32, u32),
    Seek(usize, u32),
    SeekData(usize, u32),
    SeekHole(usize, u32),
    TruncateOpen(usize, u32),
    Truncate(Place, u32),
    /// `fallocate` with a mode.
    Allocate(usize, i32, u32, u32),
    CopyRange(usize, u32, usize, u32, u32),
    /// Maps the file, writes through the mapping, syncs or not, and unmaps.
    MapWrite(usize, u32, Piece, bool),
    StatOpen(usize),
    ChmodOpen(usize, u32),
    Fsync(usize),
    Stat(Place),
    List(Place),
    ReadLink(Place),
    Mkdir(Place, u32),
    Rmdir(Place),
    Unlink(Place),
    Link(Place, Place),
    Symlink(Place, &'static str),
    Mkfifo(Place, u32),
    Rename(Place, Place, u32),
    Chmod(Place, u32),
    Chown(Place, u32, u32),
    SetTimes(Place, Time, Time),
}

/// Bytes to write: so many of the same.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub length: u32,
    pub byte: u8,
}

/// An argument of `utimensat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    Omit,
    Now,
    At(i64, i64),
}

/// What a call gave back.
pub type Seen = Result<Value, Errno>;

/// What a call that went well shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Done,
    Count(usize),
    Bytes(Vec<u8>),
    Names(Vec<String>),
    Target(String),
    Row(Row),
}

/// Everything compared of one inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// `S_IFMT` and permissions.
    pub mode: u32,
    pub links: u64,
    /// 0 for directories.
    pub size: u64,
    pub uid: u32,
    pub gid: u32,
}

/// One name in the picture of a whole tree: the row, the bytes of a file or the target of a link.
pub type Picture = BTreeMap<String, (Row, Vec<u8>)>;

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        9 => prop::collection::vec(0..NAMES.len(), 1..=1),
        5 => prop::collection::vec(0..NAMES.len(), 2..=2),
        1 => prop::collection::vec(0..NAMES.len(), 3..=3),
    ]
}

/// Offsets and lengths on both sides of a page, of the largest inline file, and further out.
fn offset() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => 0..40_u32,
        2 => 4090..4100_u32,
        2 => 8185..8200_u32,
        2 => 0..20_000_u32,
        1 => 0..150_000_u32,
    ]
}

fn length() -> impl Strategy<Value = u32> {
    offset().prop_map(|length| length.max(1))
}

fn piece() -> impl Strategy<Value = Piece> {
    (length(), 1..=255_u8).prop_map(|(length, byte)| Piece { length, byte })
}

fn open() -> impl Strategy<Value = Open> {
    use libc::{
        O_APPEND, O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY,
    };
    let common = select(vec![O_RDWR | O_CREAT, O_RDWR | O_CREAT | O_EXCL]);
    let all = select(vec![
        O_RDONLY,
        O_WRONLY,
        O_RDWR,
        O_RDONLY | O_CREAT,
        O_WRONLY | O_CREAT | O_TRUNC,
        O_WRONLY | O_CREAT | O_APPEND,
        O_RDWR | O_APPEND,
        O_RDWR | O_TRUNC,
        O_RDONLY | O_TRUNC,
        O_RDONLY | O_DIRECTORY,
        O_RDWR | O_NOFOLLOW,
    ]);
    prop_oneof![1 => common, 2 => all].prop_map(Open)
}

fn mode() -> impl Strategy<Value = u32> {
    select(vec![
        0o644, 0o600, 0o755, 0o444, 0o000, 0o4755, 0o2755, 0o2640, 0o6711, 0o1777, 0o2775,
    ])
}

fn time() -> impl Strategy<Value = Time> {
    prop_oneof![
        Just(Time::Omit),
        Just(Time::Now),
        (-5..1_500_000_000_i64, 0..1_000_000_000_i64).prop_map(|(s, n)| Time::At(s, n)),
        (-5..5_i64, 0..1_000_000_000_i64).prop_map(|(s, n)| Time::At(s, n)),
    ]
}

fn allocation() -> impl Strategy<Value = i32> {
    use libc::{FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH};
    let zero = libc::FALLOC_FL_ZERO_RANGE;
    select(vec![
        0,
        KEEP,
        KEEP | PUNCH,
        KEEP | PUNCH,
        PUNCH,
        zero,
        zero | KEEP,
    ])
}

/// What every sequence finds: directories and two open files, one of them too large to be inline.
pub fn prelude() -> Vec<Op> {
    let create = Open(libc::O_RDWR | libc::O_CREAT);
    let piece = |length| Piece { length, byte: b'x' };
    vec![
        Op::Mkdir(vec![0], 0o755),
        Op::Mkdir(vec![0, 0], 0o755),
        Op::Open(0, vec![1], create, 0o644),
        Op::Write(0, piece(10_000)),
        Op::Open(1, vec![0, 2], create, 0o644),
        Op::Write(1, piece(100)),
        Op::Symlink(vec![2], "a"),
    ]
}

/// One operation.
pub fn op() -> impl Strategy<Value = Op> {
    let slot = || 0..SLOTS;
    let names = prop_oneof![
        3 => (place(), mode()).prop_map(|(p, m)| Op::Mkdir(p, m)),
        5 => place().prop_map(Op::Rmdir),
        5 => place().prop_map(Op::Unlink),
        5 => (place(), place()).prop_map(|(a, b)| Op::Link(a, b)),
        2 => (place(), select(TARGETS.to_vec())).prop_map(|(p, t)| Op::Symlink(p, t)),
        2 => (place(), mode()).prop_map(|(p, m)| Op::Mkfifo(p, m)),
        5 => (place(), place(), 0..4_u32).prop_map(|(a, b, f)| Op::Rename(a, b, f)),
        1 => place().prop_map(Op::Stat),
        1 => place().prop_map(Op::List),
        1 => place().prop_map(Op::ReadLink),
        2 => (place(), mode()).prop_map(|(p, m)| Op::Chmod(p, m)),
        1 => (place(), 0..3_u32, 0..3_u32).prop_map(|(p, u, g)| Op::Chown(p, u, g)),
        3 => (place(), time(), time()).prop_map(|(p, a, m)| Op::SetTimes(p, a, m)),
        1 => (place(), offset()).prop_map(|(p, s)| Op::Truncate(p, s)),
    ];
    let data = prop_oneof![
        1 => slot().prop_map(Op::Close),
        3 => (slot(), piece()).prop_map(|(s, p)| Op::Write(s, p)),
        3 => (slot(), offset(), piece()).prop_map(|(s, o, p)| Op::WriteAt(s, o, p)),
        2 => (slot(), length()).prop_map(|(s, l)| Op::Read(s, l)),
        2 => (slot(), offset(), length()).prop_map(|(s, o, l)| Op::ReadAt(s, o, l)),
        1 => (slot(), offset()).prop_map(|(s, o)| Op::Seek(s, o)),
        1 => (slot(), offset()).prop_map(|(s, o)| Op::SeekData(s, o)),
        1 => (slot(), offset()).prop_map(|(s, o)| Op::SeekHole(s, o)),
        2 => (slot(), offset()).prop_map(|(s, o)| Op::TruncateOpen(s, o)),
        3 => (slot(), allocation(), offset(), length()).prop_map(|(s, m, o, l)| Op::Allocate(s, m, o, l)),
        2 => (slot(), offset(), slot(), offset(), length())
            .prop_map(|(a, x, b, y, l)| Op::CopyRange(a, x, b, y, l)),
        3 => (slot(), offset(), piece(), any::<bool>()).prop_map(|(s, o, p, y)| Op::MapWrite(s, o, p, y)),
        1 => slot().prop_map(Op::StatOpen),
        1 => (slot(), mode()).prop_map(|(s, m)| Op::ChmodOpen(s, m)),
        1 => slot().prop_map(Op::Fsync),
    ];
    prop_oneof![
        5 => (slot(), place(), open(), mode()).prop_map(|(s, p, f, m)| Op::Open(s, p, f, m)),
        12 => names,
        14 => data,
    ]
}

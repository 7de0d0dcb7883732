//! The byte stream of a session outside the runtime, for a thread that reads in big pieces.

use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;

/// What one read takes off a socket under TLS, whose own reads are small.
const CIPHERTEXT: usize = 256 * 1024;

/// A byte stream whose reads and writes block, within the bounds set on its socket.
pub struct BlockingTransport(Kind);

enum Kind {
    Plain(TcpStream),
    Tls(Box<rustls::StreamOwned<rustls::ClientConnection, BufferedSocket>>),
}

impl BlockingTransport {
    pub(super) fn plain(socket: TcpStream) -> Self {
        Self(Kind::Plain(socket))
    }

    pub(super) fn tls(session: rustls::ClientConnection, socket: TcpStream) -> Self {
        let socket = BufferedSocket(BufReader::with_capacity(CIPHERTEXT, socket));
        Self(Kind::Tls(Box::new(rustls::StreamOwned::new(session, socket))))
    }

    /// A second handle of the socket, with which another thread can shut it down.
    pub fn socket(&self) -> io::Result<TcpStream> {
        match &self.0 {
            Kind::Plain(socket) => socket.try_clone(),
            Kind::Tls(stream) => stream.sock.0.get_ref().try_clone(),
        }
    }

    /// Reads once. Says how much, and whether nothing more was there: the next read would wait.
    pub fn receive(&mut self, space: &mut [u8]) -> io::Result<(usize, bool)> {
        match &mut self.0 {
            Kind::Plain(socket) => {
                let count = socket.read(space)?;
                Ok((count, count < space.len()))
            }
            Kind::Tls(stream) => {
                let count = stream.read(space)?;
                Ok((count, count < space.len() && stream.sock.0.buffer().is_empty()))
            }
        }
    }

    /// Sends all of it.
    pub fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Kind::Plain(socket) => socket.write_all(message),
            Kind::Tls(stream) => {
                stream.write_all(message)?;
                stream.flush()
            }
        }
    }
}

/// A socket with a buffer on its reading side.
struct BufferedSocket(BufReader<TcpStream>);

impl Read for BufferedSocket {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        self.0.read(space)
    }
}

impl Write for BufferedSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.get_mut().flush()
    }
}

//! The two keys: one signs records, one encrypts contents.
//!
//! They are given as text of at least 32 random bytes, in hex or base64, from the environment or a file outside the log's folder.
//! **Invariant**: no key is ever shown, and none is read from the folder that it protects.

use std::{fmt, path::Path};

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use data_encoding::{BASE64, BASE64URL_NOPAD, HEXLOWER, HEXLOWER_PERMISSIVE};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

use super::{AuditError, line::Mac};

const MIN_KEY_BYTES: usize = 32;

/// Signs records.
#[derive(Clone)]
pub struct AuditKey(Vec<u8>);

impl fmt::Debug for AuditKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuditKey({})", self.id())
    }
}

impl AuditKey {
    /// From hex or base64.
    pub fn parse(text: &str) -> Result<Self, AuditError> {
        decode(text).map(Self)
    }

    /// From this variable.
    pub fn from_env(name: &str) -> Result<Self, AuditError> {
        Self::parse(&read_env(name)?).map_err(|error| named(name, &error))
    }

    /// From this file, which must not lie in the log's folder.
    pub fn from_file(path: &Path, log: &Path) -> Result<Self, AuditError> {
        let resolved = path.canonicalize().map_err(AuditError::io("read", path))?;
        if log.canonicalize().is_ok_and(|log| resolved.starts_with(log)) {
            return Err(AuditError::Key(format!(
                "the key {} lies in the log's own folder, where whoever touches the log can read it; move it elsewhere",
                path.display()
            )));
        }
        let text = std::fs::read_to_string(&resolved).map_err(AuditError::io("read", path))?;
        Self::parse(&text).map_err(|error| named(&path.display().to_string(), &error))
    }

    /// Tells keys apart without telling the key.
    pub fn id(&self) -> String {
        HEXLOWER.encode(&self.sign(b"bindery audit key id").0[..8])
    }

    /// The record's HMAC.
    pub(super) fn sign(&self, bytes: &[u8]) -> Mac {
        Mac(self.hmac(bytes).finalize().into_bytes().into())
    }

    /// Compares in constant time.
    pub(super) fn has_signed(&self, bytes: &[u8], mac: &Mac) -> bool {
        self.hmac(bytes).verify_slice(&mac.0).is_ok()
    }

    fn hmac(&self, bytes: &[u8]) -> Hmac<Sha256> {
        let mut hmac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        hmac.update(bytes);
        hmac
    }
}

/// Encrypts contents: XChaCha20-Poly1305, a random nonce a record, bound to the record's number.
#[derive(Clone)]
pub struct ContentsKey(XChaCha20Poly1305);

impl fmt::Debug for ContentsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContentsKey(hidden)")
    }
}

/// Encrypted contents, in base64.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sealed {
    /// Fresh for every record.
    pub nonce: String,
    /// Text and tag.
    pub sealed: String,
}

impl ContentsKey {
    /// From hex or base64: exactly 32 bytes.
    pub fn parse(text: &str) -> Result<Self, AuditError> {
        let bytes = decode(text)?;
        XChaCha20Poly1305::new_from_slice(&bytes)
            .map(Self)
            .map_err(|_| AuditError::Key(format!("the key of contents has {} bytes; give exactly 32", bytes.len())))
    }

    /// From this variable.
    pub fn from_env(name: &str) -> Result<Self, AuditError> {
        Self::parse(&read_env(name)?).map_err(|error| named(name, &error))
    }

    pub(super) fn seal(&self, seq: u64, text: &[u8]) -> Result<Sealed, AuditError> {
        let mut nonce = [0; 24];
        getrandom::fill(&mut nonce).map_err(|error| AuditError::Key(format!("no random numbers: {error}")))?;
        let sealed = self
            .0
            .encrypt(&XNonce::from(nonce), Payload { msg: text, aad: &bound_to(seq) })
            .map_err(|_| AuditError::Key("contents are too long to encrypt".to_owned()))?;
        Ok(Sealed { nonce: BASE64.encode(&nonce), sealed: BASE64.encode(&sealed) })
    }

    pub(super) fn open(&self, seq: u64, sealed: &Sealed) -> Result<Vec<u8>, AuditError> {
        let bad = || AuditError::Key(format!("the contents of record {seq} do not open with this key"));
        let nonce: [u8; 24] =
            BASE64.decode(sealed.nonce.as_bytes()).ok().and_then(|nonce| nonce.try_into().ok()).ok_or_else(bad)?;
        let text = BASE64.decode(sealed.sealed.as_bytes()).map_err(|_| bad())?;
        self.0.decrypt(&XNonce::from(nonce), Payload { msg: &text, aad: &bound_to(seq) }).map_err(|_| bad())
    }
}

/// What sealed contents cannot be moved away from.
fn bound_to(seq: u64) -> Vec<u8> {
    [b"bindery audit contents ".as_slice(), &seq.to_be_bytes()].concat()
}

fn read_env(name: &str) -> Result<String, AuditError> {
    std::env::var(name).map_err(|_| {
        AuditError::Key(format!(
            "the environment has no `{name}`; set it to 32 random bytes, as from `openssl rand -hex 32`"
        ))
    })
}

fn named(name: &str, error: &AuditError) -> AuditError {
    match error {
        AuditError::Key(why) => AuditError::Key(format!("{name}: {why}")),
        other => AuditError::Key(format!("{name}: {other}")),
    }
}

fn decode(text: &str) -> Result<Vec<u8>, AuditError> {
    let text = text.trim().as_bytes();
    let bytes = [HEXLOWER_PERMISSIVE, BASE64, BASE64URL_NOPAD].iter().find_map(|encoding| encoding.decode(text).ok());
    match bytes {
        Some(bytes) if bytes.len() >= MIN_KEY_BYTES => Ok(bytes),
        Some(bytes) => Err(AuditError::Key(format!(
            "a key of {} bytes is too short; give {MIN_KEY_BYTES}, as from `openssl rand -hex 32`",
            bytes.len()
        ))),
        None => Err(AuditError::Key("a key must be hex or base64, as from `openssl rand -hex 32`".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    #[test]
    fn keys_are_long_enough_and_not_shown() {
        assert!(AuditKey::parse("c2hvcnQ=").unwrap_err().to_string().contains("too short"));
        assert!(AuditKey::parse("not a key!").is_err());
        let key = AuditKey::parse(KEY).unwrap();
        assert!(!format!("{key:?}").contains("0102"));
        assert_eq!(AuditKey::parse("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=").unwrap().id(), key.id());
    }

    /// RFC 4231, test case 2 has a short key; test case 1 of 20 bytes is padded by HMAC itself, as any key is.
    #[test]
    fn signatures_are_hmac_sha256() {
        let mac = AuditKey(b"Jefe".to_vec()).sign(b"what do ya want for nothing?");
        assert_eq!(HEXLOWER.encode(&mac.0), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    #[test]
    fn contents_open_with_their_key_and_number_alone() {
        let key = ContentsKey::parse(KEY).unwrap();
        let sealed = key.seal(7, b"hello").unwrap();
        assert_ne!(sealed, key.seal(7, b"hello").unwrap(), "a nonce is used once");
        assert_eq!(key.open(7, &sealed).unwrap(), b"hello");
        assert!(key.open(8, &sealed).is_err());
        let other = ContentsKey::parse(&KEY.replace("00", "ff")).unwrap();
        assert!(other.open(7, &sealed).is_err());
    }

    #[test]
    fn a_key_in_the_logs_own_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, KEY).unwrap();
        assert!(AuditKey::from_file(&path, folder.path()).unwrap_err().to_string().contains("own folder"));
        let log = folder.path().join("log");
        std::fs::create_dir(&log).unwrap();
        assert!(AuditKey::from_file(&path, &log).is_ok());
    }
}

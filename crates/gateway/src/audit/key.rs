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

/// Reads a variable of the environment.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

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
    pub fn from_env(name: &str, env: Env<'_>) -> Result<Self, AuditError> {
        Self::parse(&read_env(name, env)?).map_err(|error| named(name, &error))
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

/// Encrypts contents: XChaCha20-Poly1305, a random nonce a record, bound to the record that it is sealed for.
#[derive(Clone)]
pub struct ContentsKey {
    cipher: XChaCha20Poly1305,
    id: String,
}

impl fmt::Debug for ContentsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentsKey({})", self.id)
    }
}

/// Keys that open contents: the one that seals now, and those that did before.
#[derive(Clone, Debug)]
pub struct ContentsKeys(pub Vec<ContentsKey>);

/// The record that contents are sealed for: they open for no other.
#[derive(Clone, Copy, Debug)]
pub struct SealedFor<'a> {
    /// Its number.
    pub seq: u64,
    /// Whose request.
    pub tenant: &'a str,
    /// Which.
    pub request_id: &'a str,
}

/// Encrypted contents, in base64.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sealed {
    /// Of the key that sealed them; tells keys apart without telling the key.
    pub key: String,
    /// Fresh for every record.
    pub nonce: String,
    /// Text and tag.
    pub sealed: String,
}

impl ContentsKey {
    /// From hex or base64: exactly 32 bytes.
    pub fn parse(text: &str) -> Result<Self, AuditError> {
        let bytes = decode(text)?;
        let cipher = XChaCha20Poly1305::new_from_slice(&bytes)
            .map_err(|_| AuditError::Key(format!("the key of contents has {} bytes; give exactly 32", bytes.len())))?;
        let mut hmac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(&bytes).expect("HMAC takes keys of any length");
        hmac.update(b"bindery audit contents key id");
        let id = HEXLOWER.encode(&hmac.finalize().into_bytes()[..8]);
        Ok(Self { cipher, id })
    }

    /// Tells keys apart without telling the key.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// From this variable.
    pub fn from_env(name: &str, env: Env<'_>) -> Result<Self, AuditError> {
        Self::parse(&read_env(name, env)?).map_err(|error| named(name, &error))
    }

    pub(super) fn seal(&self, record: SealedFor<'_>, text: &[u8]) -> Result<Sealed, AuditError> {
        let mut nonce = [0; 24];
        getrandom::fill(&mut nonce).map_err(|error| AuditError::Key(format!("no random numbers: {error}")))?;
        let sealed = self
            .cipher
            .encrypt(&XNonce::from(nonce), Payload { msg: text, aad: &record.bytes() })
            .map_err(|_| AuditError::Key("contents are too long to encrypt".to_owned()))?;
        Ok(Sealed { key: self.id.clone(), nonce: BASE64.encode(&nonce), sealed: BASE64.encode(&sealed) })
    }

    fn open(&self, record: SealedFor<'_>, sealed: &Sealed) -> Result<Vec<u8>, AuditError> {
        let bad = || {
            AuditError::Key(format!(
                "the contents of record {} were changed, or belong to another record: their key ({}) does not open them \
                 there; run `bindery audit verify`",
                record.seq, self.id
            ))
        };
        let nonce: [u8; 24] =
            BASE64.decode(sealed.nonce.as_bytes()).ok().and_then(|nonce| nonce.try_into().ok()).ok_or_else(bad)?;
        let text = BASE64.decode(sealed.sealed.as_bytes()).map_err(|_| bad())?;
        self.cipher.decrypt(&XNonce::from(nonce), Payload { msg: &text, aad: &record.bytes() }).map_err(|_| bad())
    }
}

impl ContentsKeys {
    /// Opens contents with the key that sealed them.
    pub(super) fn open(&self, record: SealedFor<'_>, sealed: &Sealed) -> Result<Vec<u8>, AuditError> {
        let key = self.0.iter().find(|key| key.id == sealed.key).ok_or_else(|| {
            let given: Vec<&str> = self.0.iter().map(ContentsKey::id).collect();
            AuditError::Key(format!(
                "the contents of record {} were sealed with the key {}, and the keys given are {}: name its variable in \
                 `contents_key_env` or `contents_old_key_envs`",
                record.seq,
                sealed.key,
                given.join(", ")
            ))
        })?;
        key.open(record, sealed)
    }
}

impl SealedFor<'_> {
    /// What sealed contents cannot be moved away from. Lengths stand before texts, so that none runs into the next.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"bindery audit contents 1 ".to_vec();
        bytes.extend(self.seq.to_be_bytes());
        for text in [self.tenant, self.request_id] {
            bytes.extend((text.len() as u64).to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        bytes
    }
}

fn read_env(name: &str, env: Env<'_>) -> Result<String, AuditError> {
    env(name).ok_or_else(|| {
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
    fn contents_open_with_their_key_for_their_record_alone() {
        let key = ContentsKey::parse(KEY).unwrap();
        let record = SealedFor { seq: 7, tenant: "acme", request_id: "r" };
        let sealed = key.seal(record, b"hello").unwrap();
        assert_ne!(sealed, key.seal(record, b"hello").unwrap(), "a nonce is used once");
        assert_eq!(key.open(record, &sealed).unwrap(), b"hello");
        for other in [
            SealedFor { seq: 8, ..record },
            SealedFor { tenant: "globex", ..record },
            SealedFor { request_id: "s", ..record },
            // The same bytes in a row, cut elsewhere.
            SealedFor { tenant: "acm", request_id: "er", ..record },
        ] {
            let error = key.open(other, &sealed).unwrap_err().to_string();
            assert!(error.contains("changed, or belong to another record"), "{error}");
        }
        let stranger = ContentsKey::parse(&KEY.replace("00", "ff")).unwrap();
        let error = ContentsKeys(vec![stranger.clone()]).open(record, &sealed).unwrap_err().to_string();
        assert!(error.contains(key.id()) && error.contains(stranger.id()) && error.contains("record 7"), "{error}");
        assert_eq!(ContentsKeys(vec![stranger, key.clone()]).open(record, &sealed).unwrap(), b"hello");
        assert!(!format!("{key:?}").contains("0102"));
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

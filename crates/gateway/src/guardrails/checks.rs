//! Check digits and rules of numbers that name a person or an account. What a pattern matched is only a candidate; these
//! tell it from any other number.
//!
//! Sources: ISO/IEC 7812-1 (Luhn), ISO 13616 and the SWIFT IBAN registry (lengths, mod 97), ISO 7064 (mod 11,10), the US
//! Social Security Administration (areas never issued), HMRC's NIM39110 (prefixes never issued), the DGFiP's key of the
//! NIR, Spain's Real Decreto 1553/2005 (letters), Italy's D.M. 23/12/1976 (control character).
//!
//! **Invariant**: pure functions of the candidate; separators between groups do not matter to them.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Payment cards: 12 to 19 digits, Luhn, and a first digit that card issuers use.
pub(super) fn card(text: &str) -> bool {
    let digits = digits(text);
    let first_group = text.bytes().take_while(u8::is_ascii_digit).count();
    let is_grouped_like_a_card = first_group == text.len() || first_group == 4;
    (12..=19).contains(&digits.len()) && matches!(digits[0], 2..=6) && is_grouped_like_a_card && luhn(&digits)
}

fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(index, digit)| match (index % 2, u32::from(*digit)) {
            (0, digit) => digit,
            (_, digit) => digit * 2 / 10 + digit * 2 % 10,
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Lengths by country, from the registry's release of 2025.
const IBAN_LENGTHS: &str = "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 \
                            EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 \
                            IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 \
                            NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 ST25 SV28 \
                            TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30";

/// International account numbers: the country's length, and mod 97 is 1.
pub(super) fn iban(text: &str) -> bool {
    let letters: Vec<u8> =
        text.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| byte.to_ascii_uppercase()).collect();
    let has_length = IBAN_LENGTHS
        .split_ascii_whitespace()
        .any(|row| row.as_bytes()[..2] == letters[..2] && row[2..].parse() == Ok(letters.len()));
    let remainder = letters[4..].iter().chain(&letters[..4]).fold(0_u32, |remainder, letter| match letter {
        b'0'..=b'9' => (remainder * 10 + u32::from(letter - b'0')) % 97,
        _ => (remainder * 100 + u32::from(letter - b'A') + 10) % 97,
    });
    has_length && remainder == 1
}

/// Telephone numbers: with a country code 8 to 15 digits (E.164), without 9 to 12, an American one 10.
pub(super) fn phone(text: &str) -> bool {
    let num_digits = digits(text).len();
    match text.as_bytes()[0] {
        b'+' => (8..=15).contains(&num_digits),
        b'0' => (9..=12).contains(&num_digits),
        _ => num_digits == 10,
    }
}

/// US social security numbers have no check digit, but areas, groups and serials that are never issued.
pub(super) fn us_ssn(text: &str) -> bool {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    let (area, group, serial) = (&digits[..3], &digits[3..5], &digits[5..]);
    area != "000"
        && area != "666"
        && !area.starts_with('9')
        && group != "00"
        && serial != "0000"
        && digits.bytes().any(|digit| digit != digits.as_bytes()[0])
}

/// UK national insurance numbers: prefixes that are never issued.
pub(super) fn uk_nino(text: &str) -> bool {
    !["BG", "GB", "KN", "NK", "NT", "TN", "ZZ"].contains(&text[..2].to_ascii_uppercase().as_str())
}

/// German tax numbers: one digit of the first ten stands there two or three times, the eleventh is ISO 7064 mod 11,10.
pub(super) fn de_tax_id(text: &str) -> bool {
    let digits = digits(text);
    if digits.len() != 11 || digits[0] == 0 {
        return false;
    }
    let mut counts = [0; 10];
    for digit in &digits[..10] {
        counts[usize::from(*digit)] += 1;
    }
    let repeated: Vec<i32> = counts.into_iter().filter(|count| *count > 1).collect();
    let product = digits[..10].iter().fold(10_u32, |product, digit| {
        let sum = (u32::from(*digit) + product) % 10;
        (if sum == 0 { 10 } else { sum }) * 2 % 11
    });
    matches!(repeated[..], [2 | 3]) && (11 - product) % 10 == u32::from(digits[10])
}

/// French numbers of the social security: month and key. Corsica's 2A and 2B count as 19 and 18.
pub(super) fn fr_nir(text: &str) -> bool {
    let letters: String =
        text.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_uppercase()).collect();
    let numeric = letters.replacen("2A", "19", 1).replacen("2B", "18", 1);
    let (Some(body), Some(key), Some(month)) = (numeric.get(..13), numeric.get(13..15), numeric.get(3..5)) else {
        return false;
    };
    let (Ok(body), Ok(key), Ok(month)) = (body.parse::<u64>(), key.parse::<u64>(), month.parse::<u64>()) else {
        return false;
    };
    letters.len() == 15 && matches!(month, 1..=12 | 20..=42 | 50..=99) && 97 - body % 97 == key
}

/// Spanish DNI and NIE: the letter is the number mod 23.
pub(super) fn es_dni(text: &str) -> bool {
    let letters: Vec<u8> =
        text.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| byte.to_ascii_uppercase()).collect();
    let [first, middle @ .., letter] = &letters[..] else { return false };
    let first = match first {
        b'X'..=b'Z' => u32::from(first - b'X'),
        digit => u32::from(digit - b'0'),
    };
    let number = middle.iter().fold(first, |number, digit| number * 10 + u32::from(digit - b'0'));
    letters.len() == 9 && b"TRWAGMYFPDXBNJZSQVHLCKE"[(number % 23) as usize] == *letter
}

/// Italian tax codes: the last letter is a sum over the others, those at odd places by a table.
pub(super) fn it_codice_fiscale(text: &str) -> bool {
    const ODD: [u32; 26] =
        [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23];
    let letters: Vec<u8> = text.bytes().map(|byte| byte.to_ascii_uppercase()).collect();
    let sum: u32 = letters[..15]
        .iter()
        .enumerate()
        .map(|(index, letter)| {
            let value = u32::from(if letter.is_ascii_digit() { letter - b'0' } else { letter - b'A' });
            if index % 2 == 0 { ODD[value as usize] } else { value }
        })
        .sum();
    u32::from(letters[15] - b'A') == sum % 26
}

/// Addresses of the Internet protocol, version 4.
pub(super) fn ipv4(text: &str) -> bool {
    text.parse::<Ipv4Addr>().is_ok_and(|address| !address.is_unspecified() && !address.is_broadcast())
}

/// Version 6. A short one with few digits is more often code than an address.
pub(super) fn ipv6(text: &str) -> bool {
    let num_groups = text.split(':').filter(|group| !group.is_empty()).count();
    let num_digits = text.bytes().filter(u8::is_ascii_hexdigit).count();
    (num_groups > 2 || num_digits >= 4) && (text.contains("::") || num_groups >= 7) && text.parse::<Ipv6Addr>().is_ok()
}

/// Whatever the pattern matched.
pub(super) fn any(_: &str) -> bool {
    true
}

fn digits(text: &str) -> Vec<u8> {
    text.bytes().filter(u8::is_ascii_digit).map(|byte| byte - b'0').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are the issuers' own examples, or from their test pages.
    #[test]
    fn published_examples_pass_and_any_other_last_digit_does_not() {
        type Case = (fn(&str) -> bool, &'static [&'static str]);
        let cases: [Case; 7] = [
            (
                card,
                &[
                    "4111111111111111",
                    "5555 5555 5555 4444",
                    "378282246310005",
                    "6011-1111-1111-1117",
                    "3530111333300000",
                ],
            ),
            (
                iban,
                &[
                    "GB82 WEST 1234 5698 7654 32",
                    "DE89370400440532013000",
                    "FR1420041010050500013M02606",
                    "NO9386011117947",
                ],
            ),
            (de_tax_id, &["86095742719", "47 036 892 816", "65929970489"]),
            (fr_nir, &["2 55 08 14 168 025 38", "255081416802538"]),
            (es_dni, &["12345678Z", "X1234567L", "Y1234567X", "Z1234567R"]),
            (it_codice_fiscale, &["RSSMRA85T10A562S", "MRTMTT91D08F205J"]),
            (us_ssn, &["219-09-9998", "078 05 1120"]),
        ];
        for (check, examples) in cases {
            for example in examples {
                assert!(check(example), "{example}");
            }
        }
        for (check, examples) in &cases[..6] {
            for example in *examples {
                let (body, last) = example.split_at(example.len() - 1);
                let others = if last.as_bytes()[0].is_ascii_digit() { '0'..='9' } else { 'A'..='Z' };
                let passing = others.filter(|other| check(&format!("{body}{other}"))).count();
                assert_eq!(passing, 1, "{example}");
            }
        }
    }

    #[test]
    fn what_is_never_issued_does_not_pass() {
        for never in ["000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000"] {
            assert!(!us_ssn(never), "{never}");
        }
        assert!(uk_nino("AB123456C") && !uk_nino("GB123456A") && !uk_nino("ZZ123456A"));
        assert!(!iban("XX82WEST12345698765432"), "no such country");
        assert!(!de_tax_id("12345678903"), "no digit twice");
    }

    #[test]
    fn addresses_are_told_from_code_and_versions() {
        for address in ["192.168.0.1", "8.8.8.8"] {
            assert!(ipv4(address), "{address}");
        }
        assert!(!ipv4("256.1.1.1") && !ipv4("1.2.3"));
        for address in
            ["2001:db8::1", "fe80::1ff:fe23:4567:890a", "2001:0db8:85a3:0000:0000:8a2e:0370:7334", "::ffff:10.0.0.1"]
        {
            assert!(ipv6(address), "{address}");
        }
        for code in ["a::b", "::", "12:30:45", "::1"] {
            assert!(!ipv6(code), "{code}");
        }
    }
}

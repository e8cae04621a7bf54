//! Seconds since 1970 and the calendar, as the clock's registers show them.

/// A moment as the clock's registers hold it, in binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) second: u8,
    pub(super) minute: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 1 (Sunday) to 7.
    pub(super) weekday: u8,
    pub(super) day: u8,
    pub(super) month: u8,
    /// Within the century.
    pub(super) year: u8,
    pub(super) century: u8,
}

pub(super) const DAY: i64 = 86_400;
/// Days in 400 years of the Gregorian calendar.
const ERA: i64 = 146_097;

/// Days from 1970-01-01 to a date. Counts years from March, so that the leap day is the last of its year.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let in_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year.div_euclid(400) * ERA + in_era * 365 + in_era / 4 - in_era / 100 + day_of_year - 719_468
}

/// The date of a day counted from 1970-01-01: year, month, day.
fn date(days: i64) -> (i64, u8, u8) {
    let days = days + 719_468;
    let in_era = days.rem_euclid(ERA);
    let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / (ERA - 1)) / 365;
    let day_of_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = days.div_euclid(ERA) * 400 + year_of_era + i64::from(month <= 2);
    (year, month as u8, day as u8)
}

impl Moment {
    /// The moment `seconds` after the start of 1970.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let (day_number, in_day) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = date(day_number);
        Self {
            second: (in_day % 60) as u8,
            minute: (in_day / 60 % 60) as u8,
            hour: (in_day / 3600) as u8,
            // 1970-01-01 was a Thursday.
            weekday: ((day_number + 4).rem_euclid(7) + 1) as u8,
            day,
            month,
            year: year.rem_euclid(100) as u8,
            century: year.div_euclid(100).rem_euclid(100) as u8,
        }
    }

    /// Seconds since the start of 1970. The weekday is not looked at; parts that no date has roll over into the
    /// next larger one or are taken as the nearest month and day.
    pub(super) fn seconds(&self) -> i64 {
        let year = i64::from(self.century) * 100 + i64::from(self.year);
        let days = days(year, i64::from(self.month.clamp(1, 12)), i64::from(self.day.max(1)));
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days_have_their_dates() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_709_164_800, 2024, 2, 29, 5),
            (4_107_542_400, 2100, 3, 1, 2),
            (-86_400, 1969, 12, 31, 4),
        ] {
            let m = Moment::from_seconds(seconds);
            let got = (i64::from(m.century) * 100 + i64::from(m.year), m.month, m.day, m.weekday);
            assert_eq!(got, (year, month, day, weekday), "{seconds}");
        }
    }

    #[test]
    fn every_day_of_eight_centuries_converts_back() {
        let mut before = Moment::from_seconds(-11_676_096_000 - DAY);
        for day in 0..ERA * 2 {
            let seconds = -11_676_096_000 + day * DAY + day % DAY;
            let moment = Moment::from_seconds(seconds);
            assert_eq!(moment.seconds(), seconds);
            assert!(moment.day == before.day + 1 || moment.day == 1);
            before = moment;
        }
    }
}

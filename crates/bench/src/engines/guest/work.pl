# Regular expressions, hashes and strings in the Perl interpreter.
use strict;
my (%count, $vowels, $swapped);
open my $text, '<', '/bench/data/text' or die;
while (<$text>) {
    last if $. > 12000;
    $count{$_}++ for grep { length > 2 } /([a-z]+)/g;
    $vowels += tr/aeiou//;
    $swapped .= substr $1, 0, 3 if s/(\w+) (\w+)$/$2 $1/;
}
my @top = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
print "$_ $count{$_}\n" for @top[0 .. 20];
print "$vowels ", length $swapped, " ", unpack("%32C*", $swapped), "\n";

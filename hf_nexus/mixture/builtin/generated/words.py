"""Word lists that the generators share."""


def words(text: str) -> tuple[str, ...]:
    """A word list written as one string: `words("a b")` is `("a", "b")`."""
    return tuple(text.split())


PEOPLE = words("""
    Ada Amir Anneke Anton Astrid Bao Beatriz Bilal Bram Carmen Chidi Chloe Dario Deniz Dmitri Edda Elif Emeka Esther
    Farah Felix Fumiko Gabriel Gita Goran Hana Hassan Helga Hugo Ines Ingrid Isaac Ivana Jasper Jin Joana Kaan Karim
    Katja Kofi Lars Leila Lucia Malik Marta Mateo Mei Milan Nadia Naomi Nils Noor Olga Omar Otto Paolo Petra Priya
    Quentin Rafael Ravi Rosa Ruth Samir Selma Sofia Stefan Suki Tariq Thea Tomas Uma Vera Viktor Wanda Xavier Yara
    Yusuf Zoe Zoltan
""")
ONSETS = words("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w z")
VOWELS = words("a e i o u ai ea ie oa oo")
CODAS = words("b ck d l ld m n nd ng r rd rn s sk st t th x")
PLACES = words("burg dale field ford ham haven mouth port stad ton ville wick")
GOODS = words("""
    apples beads biscuits books bricks buttons candles cards coins cups eggs envelopes figs flowers jars lemons magnets
    marbles melons mugs nails notebooks onions oranges parcels peaches pears pebbles pencils pins plates plums posters
    potatoes ribbons rings seeds shells spoons stamps stickers tickets tiles tomatoes tulips walnuts
""")
HOLDERS = words("bags baskets bowls boxes buckets cases crates drawers packets sacks tins trays")
GIVERS = ("a friend", "a neighbour", "an aunt", "a cousin", "a teacher", "a colleague", "a brother", "a grandmother")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COINS = words("crowns dollars euros florins francs guilders pesos pounds rupees shillings")

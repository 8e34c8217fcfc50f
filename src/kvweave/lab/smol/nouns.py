"""What the pictures show: 288 nouns of one word, each the Unicode name of an emoji, with its code points.

Left out: what takes no article, what is named by more than one word, what a reader would call by another name, and of
two pictures that are alike at 24 pixels one.
"""

_TABLE = """
abacus:1F9EE accordion:1FA97 airplane:2708 alembic:2697 ambulance:1F691 amphora:1F3FA anchor:2693 ant:1F41C
automobile:1F697 avocado:1F951 axe:1FA93 backpack:1F392 badger:1F9A1 bagel:1F96F balloon:1F388 banana:1F34C
banjo:1FA95 baseball:26BE basketball:1F3C0 bat:1F987 bathtub:1F6C1 battery:1F50B bear:1F43B beaver:1F9AB bed:1F6CF
beetle:1FAB2 bell:1F514 bicycle:1F6B2 bikini:1F459 bird:1F426 bison:1F9AC blowfish:1F421 boar:1F417 bomb:1F4A3
boomerang:1FA83 bouquet:1F490 brick:1F9F1 briefcase:1F4BC broom:1F9F9 bucket:1FAA3 bug:1F41B bullseye:1F3AF
burrito:1F32F bus:1F68C butterfly:1F98B cactus:1F335 calendar:1F4C5 camel:1F42A camera:1F4F7 candle:1F56F
candy:1F36C canoe:1F6F6 carrot:1F955 castle:1F3F0 cat:1F408 chestnut:1F330 chicken:1F414 chipmunk:1F43F church:26EA
clipboard:1F4CB cloud:2601 coat:1F9E5 coconut:1F965 coin:1FA99 compass:1F9ED cookie:1F36A cow:1F404 crab:1F980
crocodile:1F40A croissant:1F950 crown:1F451 crutch:1FA7C cucumber:1F952 cupcake:1F9C1 dagger:1F5E1 deer:1F98C
dog:1F415 dolphin:1F42C donkey:1FACF door:1F6AA doughnut:1F369 dove:1F54A dragon:1F409 dress:1F457 droplet:1F4A7
drum:1F941 duck:1F986 dumpling:1F95F eagle:1F985 egg:1F95A eggplant:1F346 elephant:1F418 elevator:1F6D7
envelope:2709 factory:1F3ED falafel:1F9C6 feather:1FAB6 ferry:26F4 firecracker:1F9E8 fish:1F41F flamingo:1F9A9
flashlight:1F526 flute:1FA88 fly:1FAB0 fondue:1FAD5 fox:1F98A frog:1F438 gear:2699 ghost:1F47B giraffe:1F992
goat:1F410 goose:1FABF gorilla:1F98D guitar:1F3B8 hamburger:1F354 hammer:1F528 hamster:1F439 harp:1FA89
headphone:1F3A7 headstone:1FAA6 hedgehog:1F994 helicopter:1F681 herb:1F33F hibiscus:1F33A hippopotamus:1F99B
honeybee:1F41D horse:1F40E hospital:1F3E5 jar:1FAD9 jellyfish:1FABC joystick:1F579 kangaroo:1F998 key:1F511
keyboard:2328 kite:1FA81 knot:1FAA2 koala:1F428 ladder:1FA9C laptop:1F4BB lemon:1F34B leopard:1F406
lime:1F34B-200D-1F7E9 lion:1F981 lizard:1F98E llama:1F999 lobster:1F99E locomotive:1F682 lotus:1FAB7 magnet:1F9F2
mammoth:1F9A3 megaphone:1F4E3 melon:1F348 microbe:1F9A0 microphone:1F3A4 microscope:1F52C mirror:1FA9E monkey:1F412
moose:1FACE mosquito:1F99F motorcycle:1F3CD mountain:26F0 mouse:1F401 mushroom:1F344 necktie:1F454 newspaper:1F4F0
octopus:1F419 olive:1FAD2 onion:1F9C5 orangutan:1F9A7 otter:1F9A6 owl:1F989 oyster:1F9AA package:1F4E6
paintbrush:1F58C panda:1F43C paperclip:1F4CE parachute:1FA82 parrot:1F99C peach:1F351 pear:1F350 pen:1F58A
pencil:270F penguin:1F427 pick:26CF pie:1F967 pig:1F416 pill:1F48A pineapple:1F34D pizza:1F355 plunger:1FAA0
postbox:1F4EE potato:1F954 pretzel:1F968 printer:1F5A8 purse:1F45B pushpin:1F4CC rabbit:1F407 raccoon:1F99D
radio:1F4FB rainbow:1F308 ram:1F40F rat:1F400 razor:1FA92 rhinoceros:1F98F ribbon:1F380 ring:1F48D robot:1F916
rock:1FAA8 rocket:1F680 rooster:1F413 rose:1F339 sailboat:26F5 sandwich:1F96A satellite:1F6F0 sauropod:1F995
saxophone:1F3B7 scarf:1F9E3 school:1F3EB scorpion:1F982 screwdriver:1FA9B scroll:1F4DC seat:1F4BA seedling:1F331
shamrock:2618 shark:1F988 shield:1F6E1 ship:1F6A2 shovel:1FA8F shower:1F6BF shrimp:1F990 skateboard:1F6F9
skull:1F480 skunk:1F9A8 sled:1F6F7 sloth:1F9A5 snail:1F40C snake:1F40D snowflake:2744 sparkler:1F387 speedboat:1F6A4
spider:1F577 sponge:1F9FD spoon:1F944 squid:1F991 stadium:1F3DF star:2B50 stethoscope:1FA7A stopwatch:23F1
strawberry:1F353 sun:2600 sunflower:1F33B swan:1F9A2 syringe:1F489 taco:1F32E teapot:1FAD6 telephone:260E
telescope:1F52D television:1F4FA tent:26FA thermometer:1F321 ticket:1F3AB tiger:1F405 toilet:1F6BD tomato:1F345
toolbox:1F9F0 toothbrush:1FAA5 tractor:1F69C train:1F686 tram:1F68A trombone:1FA8A trophy:1F3C6 trumpet:1F3BA
tulip:1F337 turkey:1F983 turtle:1F422 umbrella:2602 unicorn:1F984 volleyball:1F3D0 waffle:1F9C7 wastebasket:1F5D1
watch:231A watermelon:1F349 whale:1F40B wheel:1F6DE wolf:1F43A worm:1FAB1 wrench:1F527 zebra:1F993
"""

CODES: dict[str, str] = dict(entry.split(":") for entry in _TABLE.split())
NOUNS: tuple[str, ...] = tuple(CODES)
